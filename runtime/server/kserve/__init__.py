"""KServe's open inference protocol as Triton's clients speak it: text in, text out. Needs the extra ``kserve``."""
