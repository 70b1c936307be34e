"""How well texts fit: POST /v1/score by the probabilities of label tokens, POST /v1/rerank by a judgement."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from trunkline.engine.fields import INT32_MAX, Flag, Items, Number, Rule, Text, read_fields
from trunkline.engine.frontend import Chunk, GenerationRequest, Prepared
from trunkline.engine.scoring import (
    SCORE_FIELDS,
    ScoreCall,
    label_request,
    label_scores,
    parse_score,
    scores_of,
)
from trunkline.engine.vectors import last_chunks, unit_vector, vector_request
from trunkline.server.call import Json, ServedModel, request_ids
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.fields import ANY_LENGTH
from trunkline.server.respond import generation
from trunkline.text.chat_template import ChatTemplate
from trunkline.types import Pooling, RequestError

MAX_DOCUMENTS = 2048

# The prompt that Qwen3-Reranker was trained with (its model card); other chat models understand it too.
_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
_INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"

RERANK_FIELDS: Mapping[str, Rule] = {
    "model": Text(),
    "query": Text(ANY_LENGTH),
    "documents": Items(Text(ANY_LENGTH), MAX_DOCUMENTS, fewest=1),
    "instruct": Text(ANY_LENGTH),
    "top_n": Number(1, INT32_MAX, integer=True),
    "return_documents": Flag(),
    **{name: SCORE_FIELDS[name] for name in ("rid", "priority", "extra_key", "cache_salt", "user")},
}


def endpoints(parts: Parts) -> list[Endpoint]:
    rerank = partial(parse_rerank, pooling=parts.frontend.config.model.pooling)
    return [
        Endpoint(
            path, ("POST",), generation(parse, parts), Access.USER, fields, summary=summary
        )
        for path, parse, fields, summary in (
            ("/v1/score", parse_scoring, SCORE_FIELDS, "How likely label tokens follow each item"),
            ("/v1/rerank", rerank, RERANK_FIELDS, "Documents by how well they answer a query"),
        )
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScoringCall:
    """A parsed /v1/score request."""

    call: ScoreCall
    model: ServedModel
    stream: bool = False

    @property
    def requests(self) -> list[GenerationRequest]:
        return self.call.requests

    @property
    def names(self) -> Mapping[str, str]:
        return {"prompt": "items", "input_ids": "items", "token_ids_logprob": "label_token_ids"}

    async def events(
        self, batch: Sequence[Prepared], chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Json, None]:
        result = await scores_of(self.call, chunks)
        yield {
            "object": "scoring",
            "model": self.model.name,
            "scores": result.scores,
            "usage": {
                "prompt_tokens": result.prompt_tokens,
                "total_tokens": result.prompt_tokens,
                "prompt_tokens_details": {"cached_tokens": result.cached_tokens},
            },
        }

    def join(self, events: Sequence[Json]) -> Json:
        return events[-1]


def parse_scoring(body: Mapping[str, Any], model: ServedModel) -> ScoringCall:
    """Check a request. Raises RequestError."""
    call = parse_score(body)
    model.check_name(body.get("model"))
    return ScoringCall(call=call, model=model)


@dataclass(frozen=True, kw_only=True)
class RerankCall:
    """A parsed /v1/rerank request. `judged`: each request asks yes or no about a document; else the first is
    the query's vector, and the others are the documents'."""

    requests: list[GenerationRequest]
    documents: list[str]
    judged: bool
    top_n: int | None
    return_documents: bool
    stream: bool = False

    @property
    def names(self) -> Mapping[str, str]:
        return {"prompt": "documents"}

    async def events(
        self, batch: Sequence[Prepared], chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Json, None]:
        last = await last_chunks(chunks, len(batch))
        if self.judged:
            scores = [label_scores(chunk, 1.0)[0] for chunk in last]
        else:
            query, *vectors = (unit_vector(chunk.embedding) for chunk in last)
            scores, last = [float(query @ vector) for vector in vectors], last[1:]
        order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: self.top_n]
        yield {"results": [self._result(index, scores[index], last[index]) for index in order]}

    def _result(self, index: int, score: float, chunk: Chunk) -> Json:
        document = {"document": self.documents[index]} if self.return_documents else {}
        meta = {
            "id": chunk.rid,
            "method": "yes_no" if self.judged else "embedding",
            "prompt_tokens": chunk.prompt_tokens,
            "cached_tokens": chunk.cached_tokens,
        }
        return {"score": score, "index": index, **document, "meta_info": meta}

    def join(self, events: Sequence[Json]) -> Any:
        return events[-1]["results"]


def parse_rerank(body: Mapping[str, Any], model: ServedModel, *, pooling: Pooling) -> RerankCall:
    """Check a request. Raises RequestError.

    A model that has a chat template, and yes and no as single tokens, judges; others compare vectors.
    """
    fields = read_fields(RERANK_FIELDS, body)
    model.check_name(fields.get("model"))
    for name in ("query", "documents"):
        if name not in fields:
            raise RequestError(f"{name} is missing", code="missing_field", param=name)
    documents = fields["documents"]
    labels = tuple(
        token for word in ("yes", "no") for token in model.tokenizer.encode(word, add_special_tokens=False)
    )
    judged = model.template is not None and len(labels) == 2
    texts = documents if judged else [fields["query"], *documents]
    rids = request_ids(fields, "rerank", len(texts))
    if judged:
        assert model.template is not None
        requests = [
            label_request(
                rid, _judgement(model.template, fields, text), labels, fields, add_special_tokens=False
            )
            for rid, text in zip(rids, texts, strict=True)
        ]
    else:
        if "instruct" in fields:
            raise RequestError(
                "instruct: this model compares vectors, which no instruction changes: it has no template, "
                "or no tokens for yes and no",
                code="unsupported_field",
                param="instruct",
            )
        requests = [vector_request(rid, text, pooling, fields) for rid, text in zip(rids, texts, strict=True)]
    return RerankCall(
        requests=requests,
        documents=documents,
        judged=judged,
        top_n=fields.get("top_n"),
        return_documents=fields.get("return_documents", True),
    )


def _judgement(template: ChatTemplate, fields: Mapping[str, Any], document: str) -> str:
    instruct = fields.get("instruct", _INSTRUCT)
    question = f"<Instruct>: {instruct}\n<Query>: {fields['query']}\n<Document>: {document}"
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}]
    variables = {"enable_thinking": False} if "enable_thinking" in template.variables else {}
    return template.render(messages, tools=None, continue_final_message=False, variables=variables)
