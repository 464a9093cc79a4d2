//! A run that was killed and continued has the log of one that was not; and what it exports passes the oracle.

use std::{path::Path, process::Command, thread, time::Duration};

const TINY: [&str; 24] = [
    "--blocks",
    "3",
    "--width",
    "16",
    "--heads",
    "2",
    "--ffn",
    "32",
    "--context",
    "16",
    "--batch",
    "2",
    "--steps",
    "8",
    "--checkpoint-every",
    "2",
    "--validate-every",
    "4",
    "--windows",
    "6",
    "--warmup",
    "1",
    "--learning-rate",
    "0.01",
];

fn lm(verb: &str, run: &Path, memory: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lm"));
    command.arg(verb).arg(run);
    if verb == "train" {
        command.args(TINY).args(["--knum", "16", "--memory", memory]);
    }
    command
}

/// The log without its times.
fn log(run: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(run.join("log.jsonl")).unwrap_or_default();
    let mut lines: Vec<serde_json::Value> = text.lines().map_while(|line| serde_json::from_str(line).ok()).collect();
    lines.iter_mut().for_each(|line| drop(line.as_object_mut().unwrap().remove("seconds")));
    lines
}

fn killed_and_continued(memory: &str) {
    let folder = tempfile::tempdir().unwrap();
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    assert!(lm("train", &whole, memory).status().unwrap().success());
    let mut first = lm("train", &broken, memory).spawn().unwrap();
    while log(&broken).len() < 3 {
        assert!(first.try_wait().unwrap().is_none(), "the run ended before it was killed");
        thread::sleep(Duration::from_millis(5));
    }
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(lm("train", &broken, memory).status().unwrap().success());
    assert_eq!(log(&broken), log(&whole));
    assert_eq!(log(&whole).len(), 10, "8 steps and 2 validations");
    let losses: Vec<f64> = log(&whole).iter().filter_map(|line| line["loss"].as_f64()).collect();
    assert!(losses[7] < losses[0], "{losses:?}");
    if memory != "none" {
        let file = folder.path().join("layer.safetensors");
        let mut export = lm("export", &whole, memory);
        assert!(export.args(["--windows", "2", "-o"]).arg(&file).status().unwrap().success());
        let layer = ultramem::Checkpoint::open(&file).unwrap();
        assert_eq!(layer.tensor("input").unwrap().shape(), [32, 16]);
        assert!(layer.weights().is_ok());
    }
    let plot = folder.path().join("losses.svg");
    assert!(
        Command::new(env!("CARGO_BIN_EXE_lm"))
            .arg("plot")
            .arg(folder.path())
            .arg("-o")
            .arg(&plot)
            .status()
            .unwrap()
            .success()
    );
    assert!(std::fs::read_to_string(plot).unwrap().contains("whole"));
    let sample = lm("sample", &whole, memory).args(["--bytes", "5", "--prompt", "God"]).output().unwrap();
    assert!(sample.status.success() && sample.stdout.starts_with(b"God") && sample.stdout.len() >= 9);
}

#[test]
fn without_memory() {
    killed_and_continued("none");
}

#[test]
fn with_product_keys() {
    killed_and_continued("pkm");
}

#[test]
fn with_ultramem() {
    killed_and_continued("ultramem");
}

/// A run on the processor learns, as one on a wgpu device does.
#[test]
fn on_the_processor() {
    let folder = tempfile::tempdir().unwrap();
    let losses = ["cpu", "wgpu"].map(|backend| {
        let run = folder.path().join(backend);
        assert!(lm("train", &run, "ultramem").args(["--backend", backend]).status().unwrap().success());
        let sample = lm("sample", &run, "ultramem").args(["--bytes", "2", "--backend", backend]).output().unwrap();
        assert!(sample.status.success());
        log(&run).iter().filter_map(|line| line["loss"].as_f64()).collect::<Vec<f64>>()
    });
    assert_eq!(losses.each_ref().map(Vec::len), [8, 8]);
    for losses in &losses {
        assert!(losses[7] < losses[0], "{losses:?}");
    }
}
