"""`python -m uniemox_dist.cli` is `uniemox`: how ranks are started without relying on PATH."""

from uniemox_dist.cli.main import main

main()
