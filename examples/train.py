"""`tbrm train` as a script, for launchers that want one:

accelerate launch examples/train.py --config examples/recipes/tbrm.yaml --learning_rate 2e-6 --use_peft true
"""

from tbrm_trl.cli.train import main

if __name__ == "__main__":
    main()
