"""The local model: the HTTP server of llama.cpp, which runs in threads of this process.

Signals end the process at once, also while the model is loaded: running answers are repeated or continued elsewhere.
"""

import signal
import socket
from collections.abc import Callable
from typing import NoReturn

import xllamacpp

from imstream.demo.settings import LocalAISettings
from imstream.errors import ImstreamError

_ONLY_ERRORS = 1  # level of llama.cpp's log


def run(settings: LocalAISettings, announce: Callable[[str], None]) -> NoReturn:
    """Serve until a signal; call `announce` with the base URL. Raises `OSError` if the port cannot be used."""
    file = settings.file
    socket.create_server((settings.host, settings.port)).close()  # llama.cpp's own error has no reason
    _end_on_signals()
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.model_alias = {file.stem}
    parameters.n_ctx = settings.context * settings.parallel
    parameters.n_parallel = settings.parallel
    parameters.cpuparams.n_threads = settings.threads
    parameters.hostnames = [settings.host]
    parameters.port = settings.port
    parameters.sampling.temp = 0.2  # default of calls; with the usual 0.8, answers of small models become incoherent
    parameters.ui = False
    parameters.cors_origins = f"http://{settings.host}:{settings.port}"  # not the pages of all web sites, as by default
    parameters.verbosity = _ONLY_ERRORS
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError:
        raise ImstreamError(f"the model {file} cannot be loaded: llama.cpp logs the reason") from None
    _end_on_signals()  # llama.cpp has installed handlers that end its threads, but not the process
    announce(f"{server.listening_address}/v1")
    while True:
        signal.pause()


def _end_on_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
