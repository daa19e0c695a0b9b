"""`python -m spolia`, and so `torchrun -m spolia run …`."""

from spolia.cli import main

if __name__ == "__main__":
    main()
