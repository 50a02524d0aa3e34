#!/bin/bash
# sbatch examples/slurm.sh --config examples/recipes/tbrm_7b.yaml --gradient_accumulation_steps 2
#
# Several nodes under SLURM, submitted from the root of the repository: one launcher per node, one process per GPU. What
# stands behind the file's name goes to examples/train.py. The accumulation above keeps the recipe's update:
# 128 rows = 4 rows × 16 processes × 2. LAUNCH_CONFIG names another way to shard. All nodes must see the repository,
# its environment and `output_dir`.
#SBATCH --job-name=tbrm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

export LAUNCH_CONFIG=${LAUNCH_CONFIG:-examples/accelerate/multi_node.yaml}
export NUM_PROCESSES=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_ADDRESS=${NODES%%$'\n'*} # the first
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node do not meet

# Single quotes: SLURM_NODEID is another on every node.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c 'accelerate launch --config_file "$LAUNCH_CONFIG" \
    --num_machines "$SLURM_NNODES" --num_processes "$NUM_PROCESSES" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" examples/train.py "$@"' launcher "$@"
