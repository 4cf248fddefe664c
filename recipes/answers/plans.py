"""The plans: what is asked, what is run, and how it will be judged, written before the runs.

All experiments prune in steps that stand for several of the published ones: with p = 1 − 0.8ᵏ and q = p / 10 a cycle
removes what k cycles of 20 % remove, and AP has the same tenth of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ap import activations, criteria
from ap.names import unknown
from recipes import presets
from recipes.config import Experiment

THREE, FIVE = round(1 - 0.8**3, 3), round(1 - 0.8**5, 4)  # p of a cycle that stands for three or five of 20 %
DECAY = 5e-4
PRUNERS = ("magnitude", "gradient", "lamp", "lookahead", "synflow")
ARMS = ("none", "lite", "pro", "pro:pruner")
CHOSEN = "least-moved"  # what the rule of the plan `criteria` picked
HEADLINE = ("none", "lite", f"lite:{CHOSEN}")
FRESH = 1000  # the first of the seeds that nothing was chosen on

MLP = Experiment(
    model="lenet-300-100",
    data="fashion-mnist",
    inputs="non-negative",
    cycles=5,
    amount=THREE,
    rate=round(THREE / 10, 4),
    epochs=2,
    batch_size=64,
    lr=0.05,
    schedule="linear",
    weight_decay=0.0,
    monitor_every=25,
    threads=1,
)
SMALL_MLP = replace(MLP, train_images=10_000, epochs=4)
RESNET = Experiment(
    model="resnet20",
    width=0.5,
    data="cifar10",
    image_size=16,
    train_images=10_000,
    augment="none",
    cycles=3,
    amount=FIVE,
    rate=round(FIVE / 10, 4),
    epochs=4,
    batch_size=128,
    lr=0.2,
    warmup="0.5ep",
    schedule="linear",
    weight_decay=DECAY,
    monitor_every=20,
    threads=1,
)
VGG = replace(RESNET, model="vgg11", width=0.125, image_size=None, epochs=6, lr=0.02, warmup="1ep", weight_decay=0.0)
CNN = replace(RESNET, model="cnn", width=1.0, epochs=4, batch_size=64, lr=0.05, warmup="0ep", weight_decay=0.0)
PROPOSED = (  # against dead neurons, or instead of ReLU, by the papers that docs/activations.md lists
    *("relu", "leaky_relu", "prelu", "elu", "selu", "gelu", "silu", "mish", "hardswish", "relu6"),
    *("relu_squared", "star_relu", "smelu", "gsmelu", "rescu", "helu", "gcu"),
)
VIT = replace(
    RESNET,
    ap=("none",),
    model="vit-mini",
    width=0.5,
    train_images=5_000,
    optimizer="adamw",
    lr=1e-3,
    warmup="1ep",
    weight_decay=0.01,
    seeds=2,
)


@dataclass(frozen=True)
class Plan:
    """A question, and what answers it.

    Attributes:
        name: of the plan and its page.
        question: what is asked.
        text: what is run, the primary outcome, and the rule by which it will be judged; Markdown.
        experiments: by the name of their folder.
        reuses: folders of other plans that the page reads too.
        needs_gpu: on a CPU it would take days.
    """

    name: str
    question: str
    text: str
    experiments: dict[str, Experiment]
    reuses: tuple[str, ...] = ()
    needs_gpu: bool = False


def _grid() -> dict[str, Experiment]:
    base = replace(SMALL_MLP, ap=ARMS)
    return {
        f"grid-{pruner}-{'decay' if decay else 'no-decay'}": replace(
            base, pruner=pruner, weight_decay=decay, seeds=10 if (pruner, decay) == ("magnitude", 0.0) else 3
        )
        for pruner in PRUNERS
        for decay in (0.0, DECAY)
    }


def _criteria() -> dict[str, Experiment]:
    # Without weight decay `decay-corrected` is AP's criterion, and is left to the arm with decay.
    controls = [name for name in criteria.names() if name not in ("least-moved-negative", "decay-corrected", "pruner")]
    arms = ("none", "lite", *(f"lite:{name}" for name in controls))
    without = tuple(arm for arm in arms if arm != "lite:gentle-waking")  # which came after these runs
    return {
        "criteria-standard": replace(SMALL_MLP, ap=without, seeds=5, inputs="standard"),
        "criteria-global": replace(SMALL_MLP, ap=arms, seeds=10),
        "criteria-as-ap": replace(SMALL_MLP, ap=arms[2:], seeds=6, allocation="as-ap"),
        "criteria-decay": replace(
            SMALL_MLP,
            ap=("none", "lite", "lite:decay-corrected", "lite:smallest-negative"),
            seeds=10,
            weight_decay=DECAY,
        ),
    }


def _short() -> dict[str, Experiment]:
    """Presets cut to what a CPU does in minutes: fewer images, epochs, cycles and channels, nothing else changed."""
    cuts: dict[str, dict[str, Any]] = {
        "resnet20-cifar10": {"width": 0.5, "train_images": 2_000, "cycles": 2},
        "vgg19-cifar10": {"width": 0.25, "train_images": 1_000, "cycles": 2},
        "vit-cifar10": {"width": 0.5, "train_images": 2_000, "cycles": 2},
        "vit-relu-cifar10": {"width": 0.5, "train_images": 2_000, "cycles": 2},
        "resnet50-tiny-imagenet": {"train_images": 200},
        "vit-b-16-tiny-imagenet": {"train_images": 128},
    }
    shared: dict[str, Any] = {"ap": ("none", "lite"), "cycles": 1, "amount": FIVE, "rate": round(FIVE / 10, 4)}
    shared |= {"seeds": 1, "epochs": 3, "threads": 1, "probe": 500}
    return {name: replace(presets.get(f"{name}-fast").experiment, **(shared | cut)) for name, cut in cuts.items()}


def _activations() -> dict[str, Experiment]:
    short = {"cycles": 3, "amount": FIVE, "rate": round(FIVE / 10, 4), "clip_norm": 1.0, "monitor_every": 0}
    mlp, cnn = replace(SMALL_MLP, seeds=5, **short), replace(CNN, seeds=3, **short)  # type: ignore[arg-type]
    return {
        **{f"activations-mlp-{name}": replace(mlp, activation=name) for name in activations.names()},
        **{f"activations-cnn-{name}": replace(cnn, activation=name) for name in PROPOSED},
    }


def _published() -> dict[str, Experiment]:
    shared: dict[str, Any] = {"ap": (*ARMS, f"lite:{CHOSEN}"), "seeds": 5, "first_seed": FRESH}
    names = ("resnet20-cifar10", "vgg19-cifar10", "vit-cifar10", "vit-relu-cifar10")
    return {f"{name}-fast": replace(presets.get(f"{name}-fast").experiment, **shared) for name in names}


PLANS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        Plan(
            "dead-neurons",
            "How do dead-neuron rates depend on density and training step, in networks of different kinds?",
            "The rates of the networks of the other plans (an MLP, a ResNet with BatchNorm, a VGG without), and of a "
            "small vision transformer with GELU and with ReLU, all pruned by magnitude without AP. Primary outcome: "
            "the change of the dynamic rate from the dense network to the last density, with its 95 % interval over "
            "seeds. The published claim holds for a network if that interval is below zero. Rates over training "
            "steps are of training passes, one window an epoch, and are shown without a test.",
            {
                "vit-gelu": replace(VIT, activation="gelu"),
                "vit-relu": replace(VIT, activation="relu"),
            },
            reuses=("headline-mlp", "headline-resnet", "headline-vgg"),
        ),
        Plan(
            "effect",
            "Does AP raise the accuracy of pruned networks at equal density and budget?",
            "Headline cells, magnitude pruning: LeNet-300-100 on all of Fashion-MNIST with and without weight decay "
            "(ten seeds), a ResNet-20 of half width with BatchNorm and a VGG-11 of an eighth of the width without, "
            "on 10,000 CIFAR-10 images (six seeds each). Grid: five pruners × none, lite, pro, pro:pruner × with and "
            "without weight decay, LeNet-300-100 on 10,000 Fashion-MNIST images (three seeds: a first look only; ten "
            "for magnitude without decay, which is where pro is judged). Primary outcome: test accuracy at the last "
            "density, lite against none and pro against pro:pruner, paired by seed. AP helps in a cell if the paired "
            "t-test survives Holm's correction over its table; it is equivalent if two one-sided tests place the "
            "difference within ±0.5 points. The last epoch counts. Nothing is tuned for an arm: learning rates were "
            "set on the dense network. The arm least-moved came to the headline after the plan `criteria` had picked "
            "it, before any headline run of it.",
            {
                "headline-mlp": replace(MLP, ap=HEADLINE, seeds=10, cycles=6),
                "headline-mlp-decay": replace(MLP, ap=HEADLINE, seeds=10, cycles=6, weight_decay=DECAY),
                "headline-resnet": replace(RESNET, ap=HEADLINE, seeds=6),
                "headline-vgg": replace(VGG, ap=HEADLINE, seeds=6),
                **_grid(),
            },
        ),
        Plan(
            "criteria",
            "Which weights must go: does AP's choice beat its controls, and does any other?",
            "First, five seeds with images normalised as usual, to zero mean: they showed that AP raises the dead- "
            "neuron rate there, since nine of ten weights are in the first layer and see negative inputs, for which "
            "the argument does not hold. So all that follows, and the MLPs of the other plans, has images in [0, 1]. "
            "Every criterion (the two of our own, most-waking and gentle-waking, among them) beside magnitude "
            "pruning, lite schedule, compared globally and with AP's own numbers per layer (six seeds); "
            "LeNet-300-100 on 10,000 Fashion-MNIST images, ten seeds; with weight decay also AP's criterion "
            "corrected for it. A criterion is worth confirming if its mean validation accuracy over the three lowest "
            "densities is the highest; that one and AP's are then run against none with ten fresh seeds on another "
            "data set and network (a small CNN on 10,000 CIFAR-10 images). It beats AP if it does so there, p < 0.05 "
            "after Holm's correction, at the last density. Across criteria: the correlation of the change in "
            "accuracy with the change in dead-neuron rate. Least-moved-positive, which leaves more neurons dead, "
            "joined the confirmation as a third arm after the first runs, before the confirmation's.",
            {
                **_criteria(),
                "confirm-cnn": replace(
                    CNN,
                    ap=("none", "lite", f"lite:{CHOSEN}", "lite:least-moved-positive"),
                    seeds=10,
                    first_seed=FRESH,
                    monitor_every=0,
                ),
            },
        ),
        Plan(
            "activations",
            "How do the activations fare, dense and at low density, with AP and without?",
            "Every activation at its default parameters, initialised for it, in LeNet-300-100 on 10,000 Fashion-MNIST "
            "images; those that papers propose instead of ReLU also in a small CNN without BatchNorm on 10,000 "
            "CIFAR-10 images of 16 × 16 pixels. Five seeds, of the CNN three; magnitude pruning to 3.5 % of the "
            "weights in three cycles, none and lite. Learning rates are those of the ReLU networks and gradients are "
            "clipped to a norm of 1, for all: an activation that wants another rate is at a disadvantage here. Two "
            "tables for each network, each with Holm's correction over its lines: test accuracy against ReLU, dense "
            "and pruned, and AP's effect at the last density. The published explanation makes a prediction: an "
            "activation that cannot die has no dead neurons for AP to wake, so AP should gain less there than where "
            "neurons die. Primary outcome: "
            "AP's effect in the mean over the activations that can die minus that over those that cannot, paired by "
            "seed.",
            _activations(),
        ),
        Plan(
            "presets",
            "Do the published networks' recipes run from end to end?",
            "The fast presets of a ResNet, a VGG, two vision transformers and, on Tiny-ImageNet, torchvision's "
            "ResNet-50 and ViT-B/16 (which rewind to a step), cut to what a CPU does in minutes: 128 to 2,000 images, "
            "three epochs, one or two cycles, CIFAR networks at a quarter or half of their width. What is shown is "
            "that they train, prune, rewind and report; the accuracies are of networks that have hardly been trained, "
            "and one seed shows nothing about AP.",
            _short(),
        ),
        Plan(
            "depth",
            "Why does AP cost a deep network without normalisation so much accuracy?",
            "In the plan `effect` a narrow VGG-11 without BatchNorm lost with AP for every seed, most of all where a "
            "third of the weights was left. Conjecture: AP removes negative weights only, so that the mean of every "
            "layer's weights becomes positive; so are the inputs behind a ReLU; and the common positive mean that "
            "each layer then adds is amplified by the next. With enough layers and nothing that re-centres, the "
            "rewound network is far from what its initialisation was made for. It predicts that (1) removing other "
            "negative weights costs as much (random-negative, smallest-negative), (2) removing as many weights that "
            "moved little without regard to sign does not (least-moved), and (3) with BatchNorm the loss is gone. "
            "(That it is gone when AP's ticket is given the means back, by a shift of each unit's bias before the "
            "first step, is tested in the study `means`.) Four seeds each, a first look: the effect is of ten points "
            "and more. Primary outcome: test accuracy against none at the first density "
            "(32.8 %), where the loss was largest.",
            {
                "depth-criteria": replace(
                    VGG,
                    ap=tuple(f"lite:{name}" for name in ("least-moved", "random-negative", "smallest-negative")),
                    seeds=4,
                ),
                "depth-batchnorm": replace(VGG, model="vgg11-bn", seeds=4),
            },
            reuses=("headline-vgg",),
        ),
        Plan(
            "published",
            "Does AP raise the accuracy of the published networks, at their size and on all images?",
            "The fast presets as they are: ResNet-20 and VGG-19 with BatchNorm, and two small vision transformers, one "
            "with GELU, one with ReLU, on all of CIFAR-10; ten epochs a training, ten cycles to 1.2 % of the weights, "
            "magnitude pruning, five fresh seeds. Primary outcome: test accuracy at the last density, lite against "
            "none and pro against pro:pruner, paired by seed, judged as in the plan `effect`. From what small networks "
            "showed, no gain is expected where there is normalisation. The transformer with ReLU, half of whose units "
            "are dead at any density, is where AP has something to wake. Written before any of these runs, which need "
            "a GPU.",
            _published(),
            needs_gpu=True,
        ),
    )
}


def names() -> list[str]:
    """The plans."""
    return list(PLANS)


def get(name: str) -> Plan:
    """The plan of this name; ValueError with the close names for others."""
    if name not in PLANS:
        raise unknown("answer", name, PLANS)
    return PLANS[name]
