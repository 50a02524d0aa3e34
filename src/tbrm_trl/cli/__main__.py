"""`python -m tbrm_trl.cli` is `tbrm`."""

from . import main

main()
