"""`python -m palp_fast` is `palp-fast`."""

from palp_fast.cli import main

if __name__ == "__main__":
    main(prog_name="palp-fast")
