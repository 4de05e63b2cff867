"""What a run prints is for people; what it writes has every number."""

from research import writers


def test_a_long_evaluation_is_cut_on_the_terminal_and_whole_in_the_file(tmp_path, capsys):
  writer = writers.Writer(tmp_path, "plain", 0, steps=4)
  writer.start(0)
  metrics = {f"rate/{i}": i / 100 for i in range(40)}
  writer.write("eval", 4, metrics)
  writer.close()
  (line,) = capsys.readouterr().err.splitlines()
  assert line.endswith(f"rate/11 0.1100  and {40 - writers.SHOWN} more in metrics.jsonl")
  (row,) = writers.read(tmp_path / "metrics.jsonl")
  assert row.items() >= metrics.items()
