"""One certificate authority of a cluster and what it signs, made with openssl. Elliptic keys: they take milliseconds."""

from collections.abc import Sequence
from pathlib import Path

from .host import need, run

DAYS = "30"
_NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]


class Authority:
    """Signs client and server certificates into `directory`."""

    def __init__(self, directory: Path) -> None:
        need("openssl")
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.certificate = directory / "ca.crt"
        self._key = directory / "ca.key"
        if not self.certificate.exists():
            command = ["openssl", "req", "-x509", *_NEW_KEY, "-subj", "/CN=grpo-e2e-ca", "-days", DAYS]
            run([*command, "-keyout", self._key, "-out", self.certificate])

    def issue(
        self, name: str, *, user: str, groups: Sequence[str] = (), alternative_names: Sequence[str] = ()
    ) -> tuple[Path, Path]:
        """Certificate and key whose subject Kubernetes reads as this user of these groups."""
        certificate, key = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        subject = "".join(f"/O={group}" for group in groups) + f"/CN={user}"
        command: list[str | Path] = ["openssl", "req", "-x509", "-CA", self.certificate, "-CAkey", self._key, *_NEW_KEY]
        command += ["-subj", subject, "-days", DAYS, "-keyout", key, "-out", certificate]
        command += ["-addext", "basicConstraints=critical,CA:false"]
        command += ["-addext", "extendedKeyUsage=serverAuth,clientAuth"]
        if alternative_names:
            command += ["-addext", f"subjectAltName={','.join(alternative_names)}"]
        run(command)
        return certificate, key

    def signing_key(self, name: str) -> Path:
        """A bare private key, such as the one that signs service account tokens."""
        path = self.directory / f"{name}.key"
        run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path])
        return path
