"""`python -m medvlm3d`: the command line."""
from medvlm3d.front.cli import main

if __name__ == "__main__":
    main()
