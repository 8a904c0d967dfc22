"""`python -m vlm3d` is the `vlm3d` command."""

from vlm3d.cli import main

main()
