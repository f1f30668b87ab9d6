"""`python -m knnlm_cli`: the same as the console script `knnlm`."""

from knnlm_cli.main import main

if __name__ == "__main__":
    main()
