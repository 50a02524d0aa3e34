"""`python -m tbrm_trl.report RUN` writes the page of `page.write_report`."""

from .page import main

if __name__ == "__main__":
    main()
