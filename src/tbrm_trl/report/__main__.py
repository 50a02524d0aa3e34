"""`python -m tbrm_trl.report RUN` is `tbrm report RUN`: it writes the page of `page.write_report`."""

from .page import main

if __name__ == "__main__":
    main()
