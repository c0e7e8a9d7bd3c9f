"""One module a contestant, each run as a process of its own, in an environment of its own if need be."""
