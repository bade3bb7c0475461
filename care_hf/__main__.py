"""`python -m care_hf` is `care`."""

from care_hf_console.app import app

if __name__ == "__main__":
    app(prog_name="care")
