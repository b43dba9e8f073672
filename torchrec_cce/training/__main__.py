"""`torchrun --nproc_per_node N -m torchrec_cce.training CONFIG`: `torchrec-cce train` on N processes."""

import typer

from torchrec_cce.training.command import train

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
app.command()(train)

if __name__ == "__main__":
    app()
