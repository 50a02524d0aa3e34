"""`tbrm demo` as a script: teach a real language model a real reasoning task, on whatever machine this is."""

from tbrm_trl.cli.demo import main

if __name__ == "__main__":
    main()
