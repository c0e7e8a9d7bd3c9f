"""Chaos: faults injected at random into a served fleet under load, every stream compared with the undisturbed run."""
