"""`python -m launch` is `muster`."""

from launch.main import console

if __name__ == "__main__":
    console()
