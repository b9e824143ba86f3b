"""Which line and which exit status a user gets."""

import click
import pytest

from downpour.cluster.errors import UserError, one_line, run_cli, user_message


class LowerPackageError(ValueError):
    """As a package below cluster would define one: marked, not derived from UserError."""

    user_facing = True


class RemoteError(LowerPackageError):
    """As Ray hands an actor's exception back: a remote traceback for a text, and a cause."""

    def __init__(self, cause):
        super().__init__("Traceback (most recent call last):\n  File actor.py\nLowerPackageError")
        self.cause = cause


@click.group()
def main():
    """Trains."""


@main.command()
@click.option("--replicas", type=int)
def train(replicas):
    """Trains a recipe."""
    if replicas == 0:
        raise UserError("--replicas 0:\n  at least one\n  is needed")
    if replicas == 1:
        raise LowerPackageError("bad rule")
    if replicas == 2:
        raise ValueError("a defect")
    if replicas == 3:
        raise KeyboardInterrupt
    if replicas == 4:
        raise RemoteError(LowerPackageError("bad partition"))
    if replicas == 5:
        click.get_current_context().exit(7)
    if replicas == 6:
        raise click.FileError("plan.json", "no such file")


@main.command()
def status():
    """Says how a run stands."""
    return 42


def run(capsys, *argv):
    code = run_cli(main, argv)
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["train", "--replicas", "0"], "--replicas 0: at least one is needed"),
        (["train", "--replicas", "1"], "bad rule"),
        (["train", "--replicas", "4"], "bad partition"),
        (["train", "--replicas", "6"], "Could not open file 'plan.json': no such file"),
        (
            ["train", "--replicsa", "1"],
            "No such option '--replicsa'. Did you mean '--replicas'? See 'downpour train --help'",
        ),
        (
            ["train", "--replicas", "ten"],
            "Invalid value for '--replicas': 'ten' is not a valid integer; "
            "see 'downpour train --help'",
        ),
        (["trian"], "No such command 'trian'. Did you mean 'train'? See 'downpour --help'"),
        (["nonsense"], "No such command 'nonsense'; see 'downpour --help'"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(capsys, argv, line):
    assert run(capsys, *argv) == (2, f"downpour: error: {line}\n")


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ValueError, match="a defect"):
        run_cli(main, ["train", "--replicas", "2"])


def test_an_interrupt_is_130(capsys):
    code, text = run(capsys, "train", "--replicas", "3")
    assert code == 130
    assert text.strip() == "downpour: interrupted"


def test_success_is_0_unless_the_command_says_otherwise(capsys):
    assert run(capsys, "train") == (0, "")
    assert run(capsys, "status") == (42, "")
    assert run(capsys, "train", "--replicas", "5") == (7, "")


def test_nothing_at_all_shows_the_help(capsys):
    code, text = run(capsys)
    assert code == 2
    assert "Commands:" in text


def test_help_goes_to_stdout_and_is_no_error(capsys):
    assert run_cli(main, ["--help"]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_an_error_without_text_is_named_by_its_class():
    assert one_line(UserError()) == "UserError"
    assert user_message(UserError("")) == "UserError"


def test_the_marker_decides_not_an_attribute_of_the_instance():
    error = RuntimeError("x")
    error.user_facing = True
    assert user_message(error) is None
    assert user_message(LowerPackageError("x")) == "x"
