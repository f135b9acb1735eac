#!/bin/bash
#SBATCH --job-name=one
#SBATCH --comment=muster:run:job  # by which Muster finds the job again
#SBATCH --chdir=/code
#SBATCH --output=/runs/one/controller.log
#SBATCH --open-mode=append  # a job that is put back into the queue writes on
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1  # one agent, which starts the node's processes
#SBATCH --requeue
#SBATCH --signal=B:USR2@150  # SLURM's own warning; not USR1, which NCCL uses

set -e  # What cannot be set up is not started.
# This shell becomes the controller: SLURM's signals to the batch script reach it.
exec /env/bin/python -c 'import sys; sys.path.insert(0, sys.argv[1]); from launch.backends.slurm.allocation import main; main(sys.argv[2])' /muster /runs/one
