"""`tbrm demo` as a script: teach a real language model a real reasoning task, on any machine."""

from tbrm_trl.cli.demo import main

if __name__ == "__main__":
    main()
