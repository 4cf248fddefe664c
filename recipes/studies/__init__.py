"""Studies: what each activation paper claims, rebuilt and checked."""
