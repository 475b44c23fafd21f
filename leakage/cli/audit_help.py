"""The text of ``leakage audit --help``."""

from __future__ import annotations

HELP = """usage: leakage audit --example
       leakage audit --model CLASS [--data CLASS] [OPTION VALUE] ...
       leakage audit --config FILE [OPTION VALUE] ...

Attack clients that train as your module does, and report what their updates
give away. To resume an audit that was stopped, run the same command again.

what is audited:
  --example                 a LeNet on bundled images, in under a minute
  --model CLASS             the import path of your LightningModule
  --model.ARGUMENT VALUE    an argument of its constructor
  --checkpoint FILE         a checkpoint of the Trainer, with the weights
  --data CLASS              the import path of your LightningDataModule
                            (default: the train_dataloader of the module)
  --data.ARGUMENT VALUE     an argument of its constructor
  --update FILE             the update of a real client
  --before FILE             the weights before it (default: the module's)

what a client does before it shares an update:
  --client.images N                   images behind one update (default: 1)
  --client.local_steps N              steps of SGD (default: 1)
  --client.local_batch_size N         images in a step (default: all)
  --client.learning_rate RATE         (default: the module's, if it uses SGD)
  --client.momentum VALUE             of several steps (default: 0)
  --client.weight_decay VALUE         of several steps (default: 0)
  --client.shuffle true               a new order of the images in each pass
  --client.reveal_learning_rate false the attacker does not know the rate
  --client.reveal_labels true         the attacker knows the labels
  --client.dropout true               train with the module's dropout
  --client.defenses LIST              classes of leakage.defenses; see below
  --client.epochs N                   train a copy of the module first
                                      (default: 0)
  --client.name NAME                  its name in the report
  --clients LIST                      several clients, in a file

the attacks:
  --budget TIME             time for all of them: 90s, 10m, 1h (default: 10m)
  --victims N               most victims of a client (default: 100)
  --attacks LIST            (default: all that apply) some of labels, rgap,
                            gauss_newton, continuation,
                            inverting_gradients, grad_inversion,
                            dlg: '["labels", "rgap"]'
  --success_threshold MSE   below it, an image is rebuilt (default: 0.001)
  --seed SEED               of all random numbers (default: 0)
  --accelerator NAME        as in Lightning's Trainer (default: cpu)

the verdict and the report:
  --fail_above METRIC=LIMIT ...
                            success_rate=0.05 identified=0.2
  --threat_model LETTER     A to H of Carletti et al. 2025 (default: D)
  --asserted DICT           what you state about the clients:
                            '{"channel": "TLS"}'
  --output FOLDER           (default: audit)

files:
  --config FILE             these options in YAML; experiments/audit/sample.yaml
                            has several clients and defenses
  --print_config            print them and exit

exit code: 0 within all limits, or no limits; 1 a limit is exceeded;
           2 an error, or a failed self-check; 3 inconclusive
"""
