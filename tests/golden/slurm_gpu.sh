#!/bin/bash
#SBATCH --job-name=one
#SBATCH --comment=muster:run:job  # by which Muster finds the job again
#SBATCH --chdir=/code
#SBATCH --output=/runs/one/controller.log
#SBATCH --open-mode=append  # a job that is put back into the queue writes on
#SBATCH --nodes=2-4
#SBATCH --ntasks-per-node=1  # one agent, which starts the node's processes
#SBATCH --cpus-per-task=96
#SBATCH --gpus-per-node=a100:8  # not --gpus-per-task, which would hide the peers' GPUs
#SBATCH --mem=0
#SBATCH --partition=a100
#SBATCH --account="my lab"
#SBATCH --qos=high
#SBATCH --time=1-12:00:00
#SBATCH --constraint="nvlink&ib"
#SBATCH --reservation="maintenance's"
#SBATCH --exclude=n[7-9]
#SBATCH --array=0-9%1
#SBATCH --dependency=singleton
#SBATCH --kill-on-invalid-dep=yes  # not pending for ever
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR2@150  # SLURM's own warning; not USR1, which NCCL uses
#SBATCH --mail-type=END
#SBATCH --mail-user="\"me\"@there"
#SBATCH --hint=nomultithread

set -e  # What cannot be set up is not started.
module load cuda/12.4
module load 'odd name'
ulimit -n 65536
export NCCL_DEBUG=WARN
# This shell becomes the controller: SLURM's signals to the batch script reach it.
exec /env/bin/python -c 'import sys; sys.path.insert(0, sys.argv[1]); from launch.backends.slurm.allocation import main; main(sys.argv[2])' /muster /runs/one
