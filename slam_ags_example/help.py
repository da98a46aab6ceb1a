"""What ``--help`` says beyond the single options."""

__all__ = ["DESCRIPTION", "EPILOGS", "SUMMARIES"]

DESCRIPTION = """\
Find rare abnormal cells from slide labels alone.

A bag (slide) is labelled positive or negative; a positive one holds a few abnormal patches (cells),
and nothing says which. A run makes bags, pretrains an encoder (under gradient surgery, or by a
baseline's method), embeds every patch, trains an aggregator on bags, predicts test bags, and ranks
the cells of the positive ones.
"""

SUMMARIES = {
    "run": "all stages, from images to report",
    "bags": "draw bags with a witness rate",
    "pretrain": "train the encoder on the patches of the training bags",
    "embed": "embed every patch of every bag",
    "mil": "train the aggregator on bags of embeddings",
    "evaluate": "predict the test bags and measure",
    "report": "write report.html from the other files",
    "study": "methods x witness rates x seeds, ending in a table and a figure",
}

_FILES = """\
Files in --output, by the stage that writes them:
  bags      bags.json (which image is in which bag of which split)
  pretrain  checkpoint-last.pt, checkpoint-best.pt, pretraining.csv (a row an epoch)
  embed     embeddings.npz
  mil       mil.pt, mil.csv (a row an epoch)
  evaluate  test_bags.csv and test_cells.csv (every prediction), metrics.json (the numbers)
  report    report.html (numbers, curves, top-ranked cells)
  all       config.json (settings and versions; --config takes it back), timing.json
"""

_METHODS = """\
Methods:
  slam-ags    NT-Xent on patches of positive bags, similarity loss on those of negative bags, and
              --surgery on the two gradients
  weaksupcon  the same two losses, plain sum
  simclr      NT-Xent on all patches, no labels
  ws-sil      cross entropy, each patch under its bag's label
  supervised  cross entropy under true patch labels: an upper bound
  one-class   Deep SVDD on patches of negative bags
  random      an untrained encoder
"""

_PRESETS = """\
Presets: quick (a few minutes on two cores; the default), digits (the default for --data digits),
paper (the published hyperparameters, for a GPU and real images):
  slam-ags run --preset paper --data /data/BM_cytomorphology_data --output runs/paper
"""

_EXIT = "Exit codes: 0 done, 1 training failed, 2 wrong option or input, 130 interrupted.\n"

_RESUME = """\
Ctrl-C saves; after it, or a crash, or a power cut, the same command with --resume goes on. On a
CPU, with as many threads, it comes to the same bits as a run that was never stopped.
"""

_PAIRS = """\
The same --seed gives the same bags, initial weights, batches and views whatever the method, so
methods can be compared in pairs:
  slam-ags run --seed 0 --output runs/ags
  slam-ags run --seed 0 --method weaksupcon --output runs/weaksupcon
`slam-ags study` does so for many.
"""

_FROM = """\
A stage works in one folder, on what the stages before it left there. With --from it takes their
files, and the settings, from another folder first:
  slam-ags mil --from runs/first --mil pamil --output runs/pamil
"""

_STUDY = """\
Every run gets a folder of its own in --output/cells, with its report. Stop it whenever you like:
the same command goes on where it was, and tries failed runs again; methods, witness rates and seeds
may be added. It ends in rows.csv, summary.csv, table.md, figure.png and figure.svg.

  slam-ags study --methods slam-ags,weaksupcon,random --witness-rates 0.1,0.01 --seeds 0-4 \\
      --output runs/study

A method may carry a surgery: slam-ags:pcgrad. Exit codes: 0 done, 1 a run failed, 2 wrong option or
input, 130 interrupted.
"""

EPILOGS = {
    "run": "\n".join([_FILES, _METHODS, _PRESETS, _PAIRS, _RESUME, _EXIT]),
    "bags": "\n".join([_FILES, _EXIT]),
    "pretrain": "\n".join([_FROM, _METHODS, _RESUME, _EXIT]),
    "embed": "\n".join([_FROM, _EXIT]),
    "mil": "\n".join([_FROM, _EXIT]),
    "evaluate": "\n".join([_FROM, _EXIT]),
    "report": "\n".join([_FROM, _EXIT]),
    "study": _STUDY,
}
