"""The recipes that ship with mergekit-sd; `mergekit-sd demo` copies them beside its models."""
