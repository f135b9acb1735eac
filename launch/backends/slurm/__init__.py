"""SLURM: a job is submitted, its batch script becomes the controller, one agent runs on each node.

On the login node, `submit` renders (`script`), submits and follows (`follow`). In the job,
`allocation` is what the batch script turns into. Both ask SLURM through `client`.
"""
