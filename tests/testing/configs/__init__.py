"""Config files of trainings for tests. They import nothing heavy: each command that is given one
reads it."""
