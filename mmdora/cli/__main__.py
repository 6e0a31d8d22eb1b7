"""`python -m mmdora.cli`: what torchrun launches for the commands that several processes share, such as `eval`."""

from mmdora.cli import main

if __name__ == "__main__":
    main()
