"""`python -m mmdora.cli`, for torchrun and other launchers of several processes."""

from mmdora.cli import main

if __name__ == "__main__":
    main()
