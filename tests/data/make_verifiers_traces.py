"""Writes tests/data/verifiers/traces.jsonl with the package verifiers itself, through its own graph and writer.

    pip install verifiers==0.4.0          # into an environment of its own
    python tests/data/make_verifiers_traces.py

Ids are those of `common.tiny.tokenizer`: one token for each printable character, from 3 on; 1 ends a completion.
"""

import string
from pathlib import Path

from verifiers.v1.configs.agent import WireAgentConfig
from verifiers.v1.episode import EnvInfo, Episode
from verifiers.v1.graph import prepare_turn
from verifiers.v1.state import State
from verifiers.v1.task import WireTaskData
from verifiers.v1.trace import AgentInfo, ModelCall, TraceTask, WireTrace
from verifiers.v1.types import AssistantMessage, Response, ToolCall, ToolMessage, TurnTokens, UserMessage
from verifiers.v1.utils.trace_store import TRACES_FILE, write_episode

END = 1
CALL = ToolCall(id="call_1", name="add", arguments='{"a": 2, "b": 2}')


def ids(text: str) -> list[int]:
    return [3 + string.printable.index(character) for character in text]


def new_trace(index: int, trainable: bool = True) -> WireTrace:
    return WireTrace(
        id=f"trace-{index}",
        task=TraceTask(type="Sums", data=WireTaskData(idx=index, prompt="2+2", answer="4")),
        agent=AgentInfo(config=WireAgentConfig(), trainable=trainable, name="solver" if trainable else "judge"),
    )


def turn(trace: WireTrace, prompt: list, message: AssistantMessage, reason: str, tokens: TurnTokens | None) -> None:
    node = prepare_turn(trace, prompt).commit(
        Response(id="r", created=0, model="m", message=message, finish_reason=reason, tokens=tokens)
    )
    trace.calls.append(ModelCall(node=node, model="m", finish_reason=reason))


def tokens(prompt: str, completion: str, *spans: tuple[int, int]) -> TurnTokens:
    completion_ids = ids(completion.removesuffix("$")) + [END] * completion.endswith("$")
    prompt_ids = [END if token == ids("$")[0] else token for token in ids(prompt)]
    return TurnTokens(
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        completion_logprobs=[-1.0] * len(completion_ids),
        message_spans=list(spans),
    )


def finish(trace: WireTrace, **rewards: float) -> WireTrace:
    for name, value in rewards.items():
        trace.record_reward(name, value, weight=0.5 if name == "style" else 1.0)
    trace.ok = True
    trace.stop("agent_completed")
    return trace


def main() -> None:
    folder = Path(__file__).parent / "verifiers"
    folder.mkdir(exist_ok=True)
    (folder / TRACES_FILE).write_text("")
    user = UserMessage(content="2+2")
    call, result = AssistantMessage(content="", tool_calls=[CALL]), ToolMessage(tool_call_id="call_1", content="4")
    answer = AssistantMessage(content="it is 4")

    plain = new_trace(0)
    turn(plain, [user], answer, "stop", tokens("<u>2+2\n<a>", "it is 4$", (0, 7)))
    finish(plain, correct=1.0, style=0.5)

    tools = new_trace(1)
    first, opening = "<u>2+2\n<a>", "\n<t>4\n<a>"
    turn(tools, [user], call, "tool_calls", tokens(first, "[add 2 2]$", (0, 7)))
    whole = first + "[add 2 2]$" + opening
    spans = ((0, 7), (7, 20), (20, 26))
    turn(tools, [user, call, result], answer, "stop", tokens(whole, "it is 4$", *spans))
    finish(tools, correct=1.0)

    cut = new_trace(2)  # a provider that gives no tokens
    turn(cut, [user], AssistantMessage(content="it is", reasoning_content="hm"), "length", None)
    finish(cut, correct=0.0)

    failed = new_trace(3)
    turn(failed, [user], answer, "stop", None)
    failed.record_error(RuntimeError("the sandbox died"))

    branched = new_trace(4)
    turn(branched, [user], answer, "stop", None)
    turn(branched, [UserMessage(content="a summary")], answer, "stop", None)
    finish(branched, correct=1.0)

    judged = finish(new_trace(5))  # no reward was recorded
    turn(judged, [user], answer, "stop", None)
    judge = new_trace(6, trainable=False)
    turn(judge, [UserMessage(content="is it 4?")], AssistantMessage(content="yes"), "stop", None)
    finish(judge)

    for traces in ([plain], [tools], [cut], [failed], [branched], [judged, judge]):
        episode = Episode[WireTaskData, State, WireAgentConfig](
            id=f"episode-{traces[0].id}", env=EnvInfo(id="sums"), task=traces[0].task, traces=traces, ok=True
        )
        write_episode(folder, episode)


if __name__ == "__main__":
    main()
