"""What `--help` of each command shows as examples."""

EXAMPLES = {
    "demo": ["refcurv demo", "refcurv demo --out results/"],
    "report": [
        "refcurv report w.h5 corpus.h5     # layers and rho: what split dev chooses",
        "refcurv report w.h5 corpus.h5 --rho 'blocks.{23-25}.mlp.{gate,up}=0.6' --out results/",
        "refcurv report w.h5 corpus.h5 --layers 'blocks.11.mlp.*' --rho 0.75 --split dev",
        "refcurv report w.h5 corpus.h5 --basis basis.h5 --rho 0.9",
    ],
    "convert": [
        "refcurv convert ~/models/OLMo-2-1B olmo2-1b.h5",
        "refcurv convert ~/models/mine mine.h5 --ignore-key my_note --verbose",
        "refcurv convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2.h5",
    ],
    "export": [
        "refcurv export edited.h5 olmo2-1b-edited/",
        "refcurv export edited.h5 olmo2-1b-edited/ --tokenizer-from ~/models/OLMo-2-1B",
    ],
    "corpus": [
        "refcurv corpus books/*.txt --tokenizer tokenizer.json -o corpus.h5 --length 512 --pack",
        "refcurv corpus pile.jsonl --tokenizer tokenizer.json -o corpus.h5 \\\n"
        "      --population quotes:recite:test=quotes.jsonl --population clean:text:test=clean.txt",
        "refcurv corpus stories.txt --tokenizer model/ -o corpus.h5 --pack "
        "--separator '<|endoftext|>'",
        "refcurv corpus tokens.npy -o corpus.h5",
        "refcurv corpus train.bin -o corpus.h5 --token-dtype uint16",
        "refcurv corpus corpus.h5 -o more.h5 --population facts:answer:dev=facts.jsonl",
    ],
    "inspect": ["refcurv inspect olmo2-1b.h5", "refcurv inspect factors.h5 --json facts.json"],
    "collect": [
        "refcurv collect w.h5 corpus.h5 -o factors.h5 --layers 'blocks.*.mlp.*'",
        "refcurv collect w.h5 corpus.h5 -o f.h5 --layers 'blocks.{23-25}.mlp.{gate,up}' "
        "--dtype float32",
        "refcurv collect w.h5 corpus.h5 -o f.h5 --fisher signed --draws 8",
        "refcurv collect w.h5 corpus.h5 -o f.h5 --memory 6GB",
        "refcurv collect vit.h5 images.h5 -o f.h5 --layers 'blocks.*.mlp.*' --rows cls",
    ],
    "decompose": [
        "refcurv decompose factors.h5 -o basis.h5",
        "refcurv decompose factors.h5 -o basis.h5 --bias joint",
        "refcurv decompose factors.h5 -o basis.h5 --dtype float32 --memory 6GB",
    ],
    "edit": [
        "refcurv edit w.h5 basis.h5 -o edited.h5 --rho 'blocks.{23-25}.mlp.{gate,up}=0.6'",
        "refcurv edit w.h5 basis.h5 -o edited.h5 --rho 0.9",
        "refcurv edit w.h5 basis.h5 -o control.h5 --rho 0.9 --control random-basis --seed 1",
        "refcurv edit w.h5 basis.h5 -o control.h5 --rho 0.9 --control inputs",
    ],
    "truncate": [
        "refcurv truncate w.h5 -o truncated.h5 --energy 'blocks.{23-25}.mlp.{gate,up}=0.7'",
        "refcurv truncate w.h5 -o truncated.h5 --energy '**.gate=0.5' --energy '**.up=0.9'",
    ],
    "prune": [
        "refcurv prune w.h5 corpus.h5 -o pruned.h5 --layers 'blocks.{23-25}.mlp.{gate,up}' \\\n"
        "      --forget quotes --ratio 0.05 --dtype float32",
        "refcurv prune w.h5 corpus.h5 -o pruned.h5 --layers '**.up' --forget quotes --ratio 0.01 "
        "--weight 0.7",
    ],
    "certify": [
        "refcurv certify w.h5 corpus.h5",
        "refcurv certify w.h5 corpus.h5 --sequences 0-3 --digits 50 -o certificate.h5",
        "refcurv certify w.h5 corpus.h5 --of A,G,hvp --layers 'blocks.*.mlp.*' --json digits.json",
        "refcurv certify w.h5 corpus.h5 --of G --fisher sampled --seed 1 --minutes 10",
        "refcurv certify w.h5 corpus.h5 --of edit --layers 'blocks.1.mlp.*' --rho 0.9 -o edit.h5",
    ],
    "audit": [
        "refcurv audit w.h5 corpus.h5",
        "refcurv audit w.h5 corpus.h5 --memory 2GB --json audit.json",
        "refcurv audit w.h5 corpus.h5 --certify --seconds 300",
    ],
    "trace": [
        "refcurv trace w.h5 corpus.h5 -o trace.h5",
        "refcurv trace w.h5 corpus.h5 --sequences 0 7 --fisher empirical -o trace.h5",
    ],
    "validate": [
        "refcurv validate theirs.npz --reference factors.h5",
        "refcurv validate kfac_factors_blk_23.pt --model w.h5 --corpus corpus.h5 "
        "--declare fisher=empirical",
        "refcurv validate factors_mine/ --reference factors.h5 --model w.h5 --corpus corpus.h5 \\\n"
        "      --arithmetic model=bfloat16,products=float32,sums=float32",
        "refcurv validate --trace theirs.npz --model w.h5 --corpus corpus.h5 --sequences 0",
        "refcurv validate theirs.npz --reference factors.h5 --name blocks.0.mlp.up=h.0.fc "
        "--accept float32",
    ],
    "cases": [
        "refcurv cases tiny.h5 corpus.h5 -o vectors/",
        "refcurv cases tiny.h5 corpus.h5 -o vectors/ --layers 'blocks.0.mlp.*' --seed 3",
    ],
    "recite": [
        "refcurv recite w.h5 books/*.txt --tokenizer tokenizer.json -o items.jsonl",
        "refcurv recite w.h5 licences/*.txt --tokenizer model/ -o items.jsonl --run 8",
        "refcurv corpus --population quotes:recite:test=items.jsonl -o items.h5",
    ],
    "sweep": [
        "refcurv sweep w.h5 corpus.h5 -o sweep.jsonl --layers 'blocks.{21-23}.mlp.{gate,up}' \\\n"
        "      --rho 0.9,0.95,0.97 --plot front.png",
        "refcurv sweep w.h5 corpus.h5 -o sweep.jsonl --basis basis.h5 "
        "--layers 'blocks.11.mlp.*' \\\n"
        "      --layers 'blocks.{10-11}.mlp.up' --rho 0.8 --methods kfac,svd --match forgetting",
        "refcurv sweep w.h5 corpus.h5 -o sweep.jsonl --layers '**.up' --rho 0.9 --methods kfac "
        "--match rho",
    ],
    "evaluate": [
        "refcurv evaluate edited.h5 corpus.h5 --baseline w.h5",
        "refcurv evaluate w.h5 corpus.h5 --split dev --json dev.json",
        "refcurv evaluate w.h5 corpus.h5 --dtype float32 --memory 6GB",
        "refcurv evaluate edited.h5 corpus.h5 --baseline w.h5 --items items.jsonl",
        "refcurv evaluate w.h5 tasks.h5 --right able.h5",
    ],
}
