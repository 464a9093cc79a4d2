//! The last table of `docs/kernels.md`: what each kernel of a layer is predicted to take on an H100, and what it would take of each thing alone.
//! A kernel that has grown since the table was written is found by [`grown`].

use ultramem::kernels::optimiser::Rule;
use ultramem::{Dimensions, ElementType, MemoryConfig, Result, Weights};

use super::passes::{Staged, Subject, by_kernel, hidden_states};
use super::{Profile, Rates};
use crate::Gpu;

/// Tokens of the forward passes: a decoding step, a batch of them, a prefill.
const TOKENS: [usize; 3] = [1, 64, PREFILL];
/// Tokens of the backward pass and of the update.
const PREFILL: usize = 4096;
const RULE: Rule = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, decoupled: true };

/// What a kernel's prediction may grow by before the table has to be written anew.
const SHARE: f64 = 0.1;
/// And in microseconds: below, a prediction is its launch.
const LEAST: f64 = 0.5;

const TIMES: [&str; 8] = ["memory", "cache", "shared and lines", "FMA", "ALU", "IMAD", "matrix", "issue"];
const HEAD: &str = "| tokens | stage | kernel | launches | cubes | memory | L2 | shared | FMA | ALU | IMAD | matrix | issue | binds | predicted |\n\
                    |---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|";

/// The launches of the kernel of a stage, together. Times are microseconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Tokens of the pass.
    pub tokens: usize,
    /// The stage and the entry point.
    pub stage: String,
    /// See `stage`.
    pub kernel: String,
    /// What stands between the kernel and what it is predicted to take.
    cells: String,
    /// What it is predicted to take.
    pub predicted: f64,
}

/// The kernels of forward passes, of a backward pass and of an update by lazy Adam, of `ultramem_v1_1b` in bf16.
///
/// # Errors
/// Compilers that are not installed.
pub fn rows() -> Result<Vec<Row>> {
    let config = MemoryConfig::new(Dimensions::ultramem_v1_1b())?;
    let weights = Weights::random_without_tables(&config, 1);
    let (gpu, dtype) = (Gpu::H100, ElementType::BF16);
    let rates = Rates::of(gpu);
    let mut rows = Vec::new();
    for tokens in TOKENS {
        let input = hidden_states(config.hidden_size, tokens, 1);
        let subject = Subject::new(&config, &weights, &input, dtype, (gpu, &rates));
        rows.extend(of_pass(tokens, &subject.forward()?));
        if tokens == PREFILL {
            let choices = subject.choices()?;
            rows.extend(of_pass(tokens, &subject.backward(&choices)?));
            rows.extend(of_pass(tokens, &subject.update(&choices, RULE)?));
        }
    }
    Ok(rows)
}

fn of_pass(tokens: usize, staged: &[Staged]) -> Vec<Row> {
    let row = |launches: Vec<&Staged>| {
        let sum = |of: &dyn Fn(&Profile) -> f64| launches.iter().map(|it| of(&it.profile)).sum::<f64>();
        let (stage, profile) = (launches[0].stage.to_string(), &launches[0].profile);
        let time = |name| match sum(&|it| it.time(name)) {
            time if time < 0.05 => "–".to_string(),
            time => format!("{time:.1}"),
        };
        let times = TIMES.map(time).join(" | ");
        let cells = format!("{} | {} | {times} | {}", launches.len(), profile.cubes, profile.binds());
        Row { tokens, stage, kernel: profile.kernel.clone(), cells, predicted: sum(&|it| it.predicted) }
    };
    by_kernel(staged).into_iter().map(row).collect()
}

/// The table in Markdown.
pub fn table(rows: &[Row]) -> String {
    let line =
        |it: &Row| format!("| {} | {} | `{}` | {} | {:.1} |", it.tokens, it.stage, it.kernel, it.cells, it.predicted);
    std::iter::once(HEAD.to_string()).chain(rows.iter().map(line)).map(|line| line + "\n").collect()
}

/// What a page's table does not say of the rows any more: kernels that take longer than it has them by more than a tenth, kernels that it
/// lacks, and those that there are no more. Faster ones are none.
pub fn grown(page: &str, rows: &[Row]) -> Vec<String> {
    let head = HEAD.lines().next().unwrap_or_default();
    let lines = page.lines().skip_while(|line| *line != head).skip(2).take_while(|line| line.starts_with('|'));
    let mut written: Vec<(String, f64)> = lines.filter_map(written).collect();
    let mut found = Vec::new();
    for row in rows {
        let name = format!("{} tokens, {}, {}", row.tokens, row.stage, row.kernel);
        let Some(at) = written.iter().position(|(it, _)| *it == name) else {
            found.push(format!("{name}: not in the table"));
            continue;
        };
        let (_, before) = written.remove(at);
        if row.predicted > before * (1.0 + SHARE) + LEAST {
            found.push(format!("{name}: {:.1} µs, in the table {before:.1}", row.predicted));
        }
    }
    found.extend(written.into_iter().map(|(name, _)| format!("{name}: in the table, but not launched")));
    found
}

/// A line of the table: what it is of, and the prediction.
fn written(line: &str) -> Option<(String, f64)> {
    let cells: Vec<&str> = line.split('|').map(str::trim).collect();
    let [_, tokens, stage, kernel, .., predicted, _] = cells.as_slice() else { return None };
    Some((format!("{tokens} tokens, {stage}, {}", kernel.trim_matches('`')), predicted.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kernel: &str, predicted: f64) -> Row {
        let cells = "1 | 7 | 1.0 | 1.0 | 1.0 | 1.0 | 1.0 | 1.0 | 1.0 | 1.0 | latency".to_string();
        Row { tokens: 64, stage: "score".into(), kernel: kernel.into(), cells, predicted }
    }

    #[test]
    fn what_has_grown_by_more_than_a_tenth_is_found() {
        let page = format!("# Page\n\n{}\nmore\n", table(&[row("a", 100.0), row("b", 20.0)]));
        let of = |rows: &[Row]| grown(&page, rows);
        assert!(of(&[row("a", 100.0), row("b", 20.0)]).is_empty());
        assert!(of(&[row("a", 110.0), row("b", 1.0)]).is_empty(), "a tenth more, and a twentieth");
        assert_eq!(of(&[row("a", 111.0), row("b", 20.0)]), ["64 tokens, score, a: 111.0 µs, in the table 100.0"]);
        assert_eq!(of(&[row("a", 100.0)]), ["64 tokens, score, b: in the table, but not launched"]);
        let more = of(&[row("a", 100.0), row("b", 20.0), row("b", 20.0)]);
        assert_eq!(more, ["64 tokens, score, b: not in the table"]);
        assert_eq!(grown("# Page without one", &[row("a", 1.0)]).len(), 1);
    }
}
