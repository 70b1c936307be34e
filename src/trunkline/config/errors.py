"""The catalog of errors: every stable code with its cause and what to do about it (P17).

`docs/errors.md` is made from it; `make check` fails for a code that the sources use and this table
lacks, and for an entry that nothing uses. The message of an error adds the numbers, `param` names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Known(NamedTuple):
    cause: str
    fix: str


ERRORS: Mapping[str, Known] = {
    # ------------------------------------------------------------------ a request's own fields
    "chat_template_error": Known(
        "the chat template failed on these messages",
        "send roles in an order that the template knows, or another --chat-template",
    ),
    "chat_template_limit": Known(
        "rendering the chat template took too long or wrote too much", "send fewer or shorter messages"
    ),
    "context_length_exceeded": Known(
        "prompt and output together are longer than the context", "shorten the prompt or ask for fewer tokens"
    ),
    "duplicate_rid": Known("a live request has this id already", "choose a new rid, or leave it out"),
    "empty_prompt": Known("the prompt has no tokens", "send at least one"),
    "folder_not_allowed": Known(
        "a client named a folder outside of those given at the start",
        "name one below the server's own folder",
    ),
    "invalid_json": Known("the body is not JSON; the message says where", "send UTF-8 encoded JSON"),
    "invalid_type": Known("a field has a value of another type", "send the type that the message names"),
    "invalid_unicode": Known("a text holds half of a surrogate pair", "send valid Unicode"),
    "invalid_value": Known(
        "a field has a value that is not allowed, or not beside another field", "see the message"
    ),
    "kv_pool_exceeded": Known(
        "the request can never fit the KV pool", "ask for fewer tokens, or raise --max-total-tokens"
    ),
    "length_mismatch": Known(
        "a list has another length than the list of prompts", "send one entry for each prompt"
    ),
    "logprob_start_out_of_range": Known(
        "log-probabilities are to begin behind the prompt", "lower logprob_start_len"
    ),
    "min_tokens_too_large": Known(
        "the least output is more than the most", "lower min_tokens or raise max_tokens"
    ),
    "missing_field": Known("a field that is needed is not there", "send it"),
    "out_of_range": Known(
        "a number, text or list is too small, too large, too short or too long",
        "stay within the bounds of the message",
    ),
    "token_out_of_range": Known(
        "a token id is not in the model's vocabulary", "send ids of this model's tokenizer"
    ),
    "too_many_completions": Known(
        "one call asks for more completions than the server holds", "lower n or send fewer prompts"
    ),
    "unknown_field": Known(
        "no field of this route has this name", "check its spelling, or start with --allow-unknown-fields"
    ),
    "unknown_rid": Known("no live or recent request has this id", "ask sooner, with the id of the answer"),
    "unsupported_field": Known(
        "the field is known but nothing here serves it", "leave it out; the message may name another way"
    ),
    "unsupported_pooling": Known(
        "the model folder asks for a way to make vectors that is not built", "name --pooling last or mean"
    ),
    "unsupported_route": Known("the loaded model can't do what this route is for", "load a model that can"),
    # ------------------------------------------------------------------ grammars
    "grammar_failed": Known(
        "the grammar library failed on this request", "report it; other requests are not affected"
    ),
    "grammar_too_complex": Known(
        "a grammar needs too much time or memory to compile", "simplify what `pointer` names"
    ),
    "grammar_unavailable": Known(
        "the process that compiles grammars is not there", "retry; the server starts it anew"
    ),
    "invalid_grammar": Known("a schema, regex or grammar is not valid", "mend what `pointer` names"),
    "no_grammar_backend": Known(
        "the server runs without structured output", "start it with a --grammar-backend"
    ),
    "no_tool_parser": Known(
        "the server has no parser for this model's tool calls", "start it with --tool-call-parser"
    ),
    "no_reasoning": Known(
        "the model's tokenizer has no token that ends reasoning", "leave out require_reasoning"
    ),
    "unsupported_grammar": Known(
        "a valid schema, regex or grammar that can't be enforced exactly", "rewrite what `pointer` names"
    ),
    # ------------------------------------------------------------------ sessions
    "session_busy": Known("a turn of this session is running", "wait for it, or branch from an earlier one"),
    "session_exists": Known("a session has this id already", "close it, or choose another id"),
    "session_full": Known(
        "the session has reached its capacity", "open one with a larger capacity_of_str_len"
    ),
    "too_many_sessions": Known(
        "as many sessions are open as the server keeps", "close some, or raise --max-sessions"
    ),
    "unknown_session": Known("no open session has this id", "open it; it may have expired"),
    "unknown_session_rid": Known("the session has no such turn", "name a turn that has ended"),
    # ------------------------------------------------------------------ files, batches, stored responses
    "batch_not_found": Known("there is no batch with this id", "GET /v1/batches lists them"),
    "file_gone": Known("the file's content was removed by hand from the server's folder", "upload it again"),
    "file_in_use": Known("a running batch reads or writes this file", "cancel the batch or wait for it"),
    "file_too_large": Known("the file is larger than the server takes", "split it"),
    "invalid_form": Known("the upload is not the form that the route takes", "send multipart/form-data"),
    "invalid_regex": Known("a stop pattern is not a regular expression", "mend it"),
    "not_cancellable": Known("it has ended already, or can't be cancelled", "nothing is to be done"),
    "response_not_found": Known("no stored response has this id", "it was not stored, or has gone"),
    "response_running": Known("the response is not finished", "ask again when it is"),
    "needs_one_process": Known(
        "what the request reads or changes lives in one process, and the server has several",
        "start it with --tokenizer-worker-num 1",
    ),
    "storage_disabled": Known("the server keeps no files", "start it with --file-storage-path"),
    "storage_failed": Known("the server's storage could not be read or written", "see its log"),
    "storage_full": Known("the server's storage has no room", "delete files"),
    "too_many_batches": Known("as many batches wait as the server takes", "retry when some have ended"),
    # ------------------------------------------------------------------ access and HTTP
    "admin_key_needed": Known("the key that was sent does not open this route", "send the admin key"),
    "body_timeout": Known("the body did not arrive in time", "send it at once"),
    "body_too_large": Known("the body has too many bytes", "send less, or raise the server's limit"),
    "invalid_api_key": Known("the key is missing or wrong", "send Authorization: Bearer KEY"),
    "method_not_allowed": Known("the route has other methods", "use one that the message names"),
    "model_not_found": Known("another model is served here", "use a name that GET /v1/models lists"),
    "no_chat_template": Known(
        "the model has no chat template", "use /v1/completions, or start with --chat-template"
    ),
    "not_found": Known(
        "there is no such route or object", "check the address; /openapi.json lists the routes"
    ),
    "origin_not_allowed": Known("a page of another site sent this", "allow its origin at the server"),
    # ------------------------------------------------------------------ load and life of the server
    "aborted": Known("somebody ended the request", "send it again if that was not wanted"),
    "draining": Known("the server is stopping and takes no new requests", "send it to another server"),
    "engine_busy": Known("this can only be done when the engine is idle, or it is asked too often", "retry"),
    "engine_closed": Known("the Engine was shut down", "make a new one"),
    "engine_dead": Known("the engine process has ended or is starting anew", "retry; the log has the reason"),
    "engine_stalled": Known(
        "no token came within the time of the probe", "look at load and log; raise limits or restart"
    ),
    "internal_error": Known("a fault of ours", "report it with the request id; the log has the details"),
    "paused": Known("generation is paused", "POST /continue_generation"),
    "priority_disabled": Known(
        "the server lets no request name a priority", "leave the field out; --enable-priority-scheduling"
    ),
    "queue_full": Known(
        "as many requests, or prompt tokens, wait as the queue holds",
        "retry after Retry-After; --max-queued-requests, --max-queued-tokens",
    ),
    "request_failed": Known(
        "the model gave no usable numbers for this request", "check the checkpoint and dtype"
    ),
    "running_timeout": Known(
        "the request ran longer than it may", "ask for fewer tokens; --request-running-timeout"
    ),
    "slow_reader": Known("the client left too much of its output unread", "read the stream as it comes"),
    "shutdown": Known("the server stopped while the request ran", "send it to another server"),
    "step_failed": Known(
        "a step of the engine failed; only its requests end", "retry; report it with the log"
    ),
    "too_many_requests": Known("as many HTTP requests are in progress as may be", "retry after Retry-After"),
    "waiting_timeout": Known(
        "the request waited longer than it may", "retry after Retry-After; --request-waiting-timeout"
    ),
    # ------------------------------------------------------------------ flags and starting
    "bad_certificate": Known("the TLS certificate or key can't be used", "check the --ssl- flags"),
    "bad_folder": Known("a folder can't be written to", "choose another, or mend its permissions"),
    "bad_host": Known(
        "--host is no address of this machine", "use 127.0.0.1, 0.0.0.0 or a name that resolves"
    ),
    "bad_socket": Known("the Unix socket can't be made", "check the path of --uds"),
    "conflicting_flags": Known("two flags contradict each other", "drop one"),
    "context_too_long": Known("--context-length is beyond the model's positions", "lower it"),
    "process_dead": Known("an API process died while starting, or again and again", "see the log"),
    "core_failed": Known("the engine failed while it ran", "report it with the log"),
    "device_unavailable": Known("the device is not there", "use --device cpu; `trunkline doctor` says more"),
    "dtype_unavailable": Known("this machine can't compute in that type", "use --dtype float32"),
    "file_not_found": Known("a file that was named is not there", "check the path"),
    "incompatible": Known("two settings can't be had together", "see docs/capabilities.md"),
    "invalid_flag": Known("a flag has a value that it can't have", "see --help"),
    "missing_flag": Known("a flag that is needed was not given", "give it"),
    "missing_package": Known(
        "an optional package is not installed", "install the extra that the message names"
    ),
    "pool_too_small": Known(
        "the KV pool can't hold one request of the context's length", "raise it or lower --context-length"
    ),
    "port_forbidden": Known("this user may not open that port", "use a port from 1024 on"),
    "port_in_use": Known("something listens on that port", "stop it or choose another --port"),
    "start_failed": Known("the engine could not start", "see the log above the message"),
    "too_little_memory": Known(
        "weights and KV pool do not fit", "the message says by how much and which flag helps"
    ),
    "unknown_flag": Known("no flag has this name", "check its spelling"),
    "unsupported_flag": Known("SGLang has this flag, Trunkline does not", "drop it; the message says why"),
    # ------------------------------------------------------------------ model folders
    "bad_chat_template": Known("the chat template is not valid Jinja", "mend it, or give --chat-template"),
    "bad_checkpoint": Known("a checkpoint file can't be read", "download it again"),
    "bad_config": Known(
        "config.json or generation_config.json has a value that can't be used", "mend what the message names"
    ),
    "bad_tokenizer": Known("tokenizer.json can't be used", "download it again"),
    "bad_weight": Known("a weight has values that can't be used", "download the checkpoint again"),
    "dtype": Known("the weights have a type that is not supported", "convert them"),
    "extra_tensor": Known(
        "the checkpoint has tensors that the architecture has not", "check that config.json belongs to it"
    ),
    "hub_unreachable": Known("the model hub can't be reached", "give a local folder"),
    "missing_shard": Known("a file of the checkpoint is not there", "download it"),
    "missing_tensor": Known("the checkpoint lacks a tensor", "check that config.json belongs to it"),
    "no_config": Known("the folder has no config.json", "name a model folder"),
    "no_model": Known("there is no such model", "check the path or id"),
    "no_tokenizer": Known("the folder has no tokenizer.json", "give --tokenizer-path"),
    "no_weights": Known("the folder has no safetensors files", "convert the checkpoint"),
    "wrong_dtype": Known(
        "a tensor has another type than the architecture wants", "check that config.json belongs to it"
    ),
    "wrong_shape": Known(
        "a tensor has another shape than the architecture wants", "check that config.json belongs to it"
    ),
    # ------------------------------------------------------------------ commands and programs
    "bad_dump": Known("the file is no dump of this version", "name a file that a server wrote"),
    "bench_failed": Known("a benchmark could not run to its end", "see the message"),
    "client_failed": Known("a client process of the benchmark died", "see its output"),
    "connection_closed": Known(
        "the server closed the connection in the middle of an answer", "retry; see its log"
    ),
    "disk_full": Known("there is no room for the model", "free some, or choose another folder"),
    "folder_not_empty": Known("the folder for the model holds something", "choose another"),
    "invalid_dataset": Known("a benchmark's data can't be used", "mend what the message names"),
    "launch_timeout": Known("the server that was started did not answer in time", "see its log"),
    "no_api_key": Known("an outside service needs a key", "set its environment variable"),
    "no_eos": Known("the model has no end token, which constrained output needs", "use another model"),
    "no_output": Known("a server answered without any token", "see its log"),
    "profile_refused": Known("a profile could not be started or stopped now", "see the message"),
    "no_server": Known("no server answers at that address", "check --url, or leave it out"),
    "no_thinking": Known("the model's template knows no thinking", "leave /think"),
    "refused": Known("another server refused a request of a benchmark", "see the message"),
    "too_few_rows": Known(
        "a benchmark asks for more rows than the engine has", "raise --max-running-requests"
    ),
    "server_ended": Known("the server that was started has ended", "see its log"),
    "speculation_failed": Known(
        "an endpoint did not follow the program's text", "leave out num_api_spec_tokens"
    ),
    "warmup_failed": Known("the first request of a benchmark failed", "see the message"),
}
