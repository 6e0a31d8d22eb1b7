"""`python -m mmdora.commands`: what torchrun launches for the commands that several processes share, such as `eval`."""

from mmdora.commands import main

if __name__ == "__main__":
    main()
