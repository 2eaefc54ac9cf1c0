"""`deepspeed --module medusa_ds RECIPE [key=value ...]`: train a recipe that has no launch stub."""

from medusa_ds.programs.train import main

if __name__ == "__main__":
    main()
