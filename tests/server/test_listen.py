"""What the server listens on: TCP, a Unix socket, TLS (P12, P14)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.server.live import Server
from trunkline.config.credentials import read_secrets
from trunkline.config.flags import Args
from trunkline.config.schema import ServerConfig
from trunkline.server.listen import is_exposed, listening, shown_address, tls_context
from trunkline.types import RequestError


# ---------------------------------------------------------------------- keys from files
def test_keys_from_files(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sekrit\n")
    (tmp_path / "empty").write_text("\n")
    args = read_secrets(Args(api_key=f"@{tmp_path}/key", admin_api_key="plain"))
    assert (args.api_key, args.admin_api_key) == ("sekrit", "plain")
    for name in ("empty", "none"):
        with pytest.raises(RequestError, match="--admin-api-key") as caught:
            read_secrets(Args(admin_api_key=f"@{tmp_path}/{name}"))
        assert caught.value.code == "file_not_found"


def test_who_can_reach_it() -> None:
    assert is_exposed(ServerConfig(host="0.0.0.0")) and is_exposed(ServerConfig(host="::"))
    for config in (
        ServerConfig(),
        ServerConfig(host="::1"),
        ServerConfig(host="0.0.0.0", api_key="k"),
        ServerConfig(host="0.0.0.0", uds="/x"),
    ):
        assert not is_exposed(config)


# ---------------------------------------------------------------------- Unix sockets
def test_a_unix_socket_is_private_and_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    config = ServerConfig(uds=str(path))
    with listening(config) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert shown_address(config, listener) == f"unix:{path}"
        with pytest.raises(RequestError, match="listens on") as caught, listening(config):
            pass
        assert caught.value.code == "port_in_use" and path.exists()
    assert not path.exists()


def test_what_a_killed_server_left_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with listening(ServerConfig(uds=str(path))) as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        listener.accept()[0].close()
    path.write_text("precious")
    with pytest.raises(RequestError, match="another kind"), listening(ServerConfig(uds=str(path))):
        pass
    assert path.read_text() == "precious"
    for bad in (tmp_path / "no" / "a.sock", Path("/" + "x" * 200)):
        with pytest.raises(RequestError) as caught, listening(ServerConfig(uds=str(bad))):
            pass
        assert caught.value.code == "bad_socket" and caught.value.param == "--uds"


def test_a_socket_that_came_in_its_place_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with listening(ServerConfig(uds=str(path))), socket.socket(socket.AF_UNIX) as other:
        os.rename(path, tmp_path / "old")
        other.bind(str(path))
    assert path.exists()


def test_serving_on_a_unix_socket(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "serve.sock"
    server = Server(tiny_model, "--uds", str(path))
    answer = server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 3})
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert all(
        c.status != psutil.CONN_LISTEN for c in psutil.Process(server.process.pid).net_connections("tcp")
    )
    core = server.core()
    server.process.kill()  # leaves nothing behind, even so
    server.process.wait()
    psutil.wait_procs([core], timeout=10)
    assert not path.exists()
    server.stop()
    again = Server(tiny_model, "--uds", str(path))
    assert again.stop()[0] == 0
    assert not path.exists()


# ---------------------------------------------------------------------- TLS
class Certificates:
    """A certificate for 127.0.0.1 that signs itself, with an encrypted key, and one of somebody else."""

    def __init__(self, folder: Path) -> None:
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self.other, self.other_key = folder / "other.pem", folder / "other-key.pem"
        self._make(self.cert, self.key, "-passout", "pass:open")
        self._make(self.other, self.other_key, "-nodes")

    @staticmethod
    def _make(cert: Path, key: Path, *protection: str) -> None:
        subject = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days",
             "2", "-keyout", str(key), "-out", str(cert), *subject, *protection],
            check=True, capture_output=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program")
    return Certificates(tmp_path_factory.mktemp("tls"))


def tls_refusal(**settings: str) -> RequestError:
    with pytest.raises(RequestError) as caught:
        tls_context(ServerConfig(**settings))
    return caught.value


def test_bad_certificates_are_named(certificates: Certificates) -> None:
    cert, key = str(certificates.cert), str(certificates.key)
    assert tls_context(ServerConfig()) is None
    assert (
        tls_context(ServerConfig(ssl_certfile=cert, ssl_keyfile=key, ssl_keyfile_password="open")) is not None
    )
    for settings in (
        {"ssl_certfile": cert, "ssl_keyfile": key},  # no password
        {"ssl_certfile": cert, "ssl_keyfile": key, "ssl_keyfile_password": "wrong"},
        {"ssl_certfile": cert, "ssl_keyfile": str(certificates.other_key)},
        {"ssl_certfile": cert},
        {"ssl_certfile": key, "ssl_keyfile": key},
    ):
        error = tls_refusal(**settings)
        assert (error.code, error.param) == ("bad_certificate", "--ssl-certfile")
    error = tls_refusal(
        ssl_certfile=str(certificates.other), ssl_keyfile=str(certificates.other_key), ssl_ca_certs=key
    )
    assert (error.code, error.param) == ("bad_certificate", "--ssl-ca-certs")


def test_https_with_certificates_of_clients(
    tiny_model: Path, certificates: Certificates, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("open\n")
    trusting = ssl.create_default_context(cafile=str(certificates.cert))
    trusting.load_cert_chain(certificates.other, certificates.other_key)
    server = Server(
        tiny_model, "--ssl-certfile", str(certificates.cert), "--ssl-keyfile", str(certificates.key),
        "--ssl-keyfile-password", f"@{tmp_path}/password", "--ssl-ca-certs", str(certificates.other),
        verify=trusting,
    )  # fmt: skip
    answer = server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 3})
    assert answer.json()["usage"]["completion_tokens"] == 3
    nobody = ssl.create_default_context(cafile=str(certificates.cert))
    with httpx.Client(base_url=server.url, verify=nobody) as http, pytest.raises(httpx.TransportError):
        http.get("/health")
    plain = httpx.Client(base_url=server.url.replace("https", "http"))
    with plain as http, pytest.raises(httpx.TransportError):
        http.get("/health")
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(timeout=25)  # the client's idle connection gives no goodbye: uvloop would wait 30 s
    code, output = server.stop()
    assert code == 0 and "open" not in output.replace("opened", "") and "https://127.0.0.1" in output


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_streams_over_https(tiny_model: Path, certificates: Certificates, processes: int) -> None:
    """The same over TLS as over one stream of bytes: whole streams, many at once, clients that leave, and the
    official client; with several processes, on the one socket."""
    trusting = ssl.create_default_context(cafile=str(certificates.other))
    server = Server(
        tiny_model, "--ssl-certfile", str(certificates.other), "--ssl-keyfile", str(certificates.other_key),
        "--tokenizer-worker-num", str(processes), "--api-key", "key", verify=trusting,
    )  # fmt: skip
    body = {"prompt": "hello", "max_tokens": 300, "ignore_eos": True, "temperature": 0}
    server.http.headers["authorization"] = "Bearer key"
    whole = server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]

    def streamed(leave: bool) -> str:
        text = ""
        with (
            httpx.Client(base_url=server.url, verify=trusting, headers=server.http.headers) as http,
            http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response,
        ):
            for line in response.iter_lines():
                if line == "data: [DONE]" or (leave and len(text) > 20):
                    return text
                if line.startswith("data: "):
                    text += json.loads(line[6:])["choices"][0]["text"]
        raise AssertionError("the stream ended without its last event")

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(streamed, [False, True] * 6))
    assert texts[::2] == [whole] * 6 and all(whole.startswith(text) for text in texts[1::2])
    assert min(map(len, texts)) < len(whole)
    server.wait(lambda: server.pages_in_use() == 0, 10)
    with (
        httpx.Client(verify=trusting) as http,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", http_client=http) as client,
    ):
        (model,) = client.models.list().data
        pieces = client.completions.create(
            model=model.id,
            stream=True,
            prompt="hello",
            max_tokens=300,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert "".join(piece.choices[0].text for piece in pieces) == whole
    with (
        httpx.Client(verify=trusting) as http,
        pytest.raises(openai.AuthenticationError),
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="other", http_client=http) as client,
    ):
        client.models.list()
    code, log = server.stop()
    assert code == 0 and "Traceback" not in log, log


def test_a_second_signal_ends_at_once(tiny_model: Path) -> None:
    server = Server(tiny_model, "--drain-timeout", "600")
    core = server.core()
    body = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True, "n": 8, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        for _ in range(20):
            next(lines)  # it goes on
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=10) == 0
    psutil.wait_procs([core], timeout=5)
    assert not core.is_running()
    assert "Traceback" not in server.stop()[1]
