# Sourced by the scripts beside it: goes to the checkout's root and leaves $PYTHON, an environment with this project
# in it. VENV names the environment (default: .venv in the checkout); $1 is the extra to install.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
VENV="${VENV:-.venv}"
PYTHON="$VENV/bin/python"
stamp="$VENV/.installed-$1-$({ cat pyproject.toml; pwd; } | sha256sum | cut -c1-16)"
# Checkouts that share an environment take it from each other: the one whose packages are imported must be this one.
here="$([ ! -e "$stamp" ] || "$PYTHON" -I -c 'import importlib.util as u; print(getattr(u.find_spec("ap"), "origin", ""))')"
if [ "$here" != "$PWD/ap/__init__.py" ]; then
    echo "setting up $VENV (PyTorch is a large download: a few minutes the first time)"
    [ -x "$PYTHON" ] || "${BASE_PYTHON:-python3}" -m venv "$VENV" || exit
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable ".[$1]" || exit
    touch "$stamp"
fi
