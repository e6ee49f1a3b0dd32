# SPDX-License-Identifier: GPL-2.0-or-later
"""``qrapd completion``: what a shell needs to complete commands, options and the names of VMs."""

from __future__ import annotations

import click

__all__ = ["completion"]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completions for a shell.

    \b
    bash:  qrapd completion bash > ~/.local/share/bash-completion/completions/qrapd
    zsh:   qrapd completion zsh  > a file _qrapd in a directory of $fpath
    fish:  qrapd completion fish > ~/.config/fish/completions/qrapd.fish
    """
    from click.shell_completion import BashComplete, get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, shell
    made = kind(context.find_root().command, {}, "qrapd", "_QRAPD_COMPLETE")
    if isinstance(made, BashComplete):
        # Its source() would first run the bash of this host, which need not be the one that reads this.
        click.echo(made.source_template % made.source_vars())
    else:
        click.echo(made.source())
