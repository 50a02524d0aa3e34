"""`python -m tbrm_trl.memory` prints the table of `estimate.MemoryEstimate`."""

from .estimate import main

main()
