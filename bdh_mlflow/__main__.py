"""`python -m bdh_mlflow`: the same commands as the console script `bdh-mlflow`."""

from bdh_mlflow.cli.main import main

if __name__ == "__main__":  # worker processes of the data loader import this module under another name
    main()
