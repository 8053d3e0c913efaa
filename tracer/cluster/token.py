"""A user's own bearer token, to send to an agent."""

from pathlib import Path

from tracer.cluster.access import find_config, plugin_token
from tracer.cluster.errors import ClusterError
from tracer.cluster.fields import shown

# A token is a JWT of one or two KiB; agents refuse longer ones than this.
_MAX = 16 << 10


def token_in(path: Path) -> str:
    """
    Return the token in a file.

    Raises:
        ClusterError: It cannot be read, or does not contain a token.
    """
    try:
        with path.open("rb") as file:
            token = file.read(_MAX + 2).strip()
    except OSError as error:
        raise ClusterError(f"cannot read token file {path}: {error.strerror}") from None
    return _checked(token.decode(errors="replace"), f"token file {path}")


def token_of(kubeconfig: Path | None, context: str | None) -> str:
    """
    Return the token of a kubeconfig's user, or of a pod's service account.

    Args:
        kubeconfig: File to read; None to look where kubectl and pods do.
        context: Context in it; None for its current one.

    Raises:
        ClusterError: There is no configuration, or its user has no token.
    """
    config = find_config(kubeconfig, context)
    user, name = config.user, f"context {shown(config.context_name)}"
    if user is not None and user.token_file:
        return token_in(Path(config.abs_file(user.token_file)))
    if user is not None and user.token:
        return _checked(user.token, name)
    if user is not None and user.exec:
        return _checked(plugin_token(user.exec), name)
    raise ClusterError(
        f"{name}: its user has no token, and an agent accepts nothing else; 'kubectl create token'"
        " prints one for --token-file"
    )


def _checked(token: str, where: str) -> str:
    if not token or len(token) > _MAX or not token.isascii() or not token.isprintable():
        raise ClusterError(f"{where} holds no valid bearer token")
    if " " in token:
        raise ClusterError(f"{where} holds no token but several words")
    return token
