"""`python -m delf_milvus`: the command line, as `torchrun -m delf_milvus train ...` starts it too."""

from delf_milvus.cli.main import run

run()
