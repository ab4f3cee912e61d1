"""The demo AI backend: a stand-in for a model that says so, and speaks the real protocol over HTTP.

It answers every question with a canned text that quotes it, at a human pace, in a process of its own; and it fails,
hangs and breaks off when it is told to, by its settings for a share of all calls, or by a marker in a question for that
question alone. So it is what a newcomer meets first and the test bench of everything that stands before a model.

    settings   how it behaves
    marker     the marker by which one question scripts its own call
    answer     the canned answer, as a pure function
    protocol   what a call asks for, and the events that answer it, as bytes
    moderation what a call of the moderation asks for, and the rule that answers it
    backend    what is done with a call
    server     runs it

    http_server    HTTP below it, and below the AI backends of the benchmark and the tests
"""
