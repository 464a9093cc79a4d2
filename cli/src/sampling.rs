//! Times of work on a device, taken so that they can be compared: warmed up, in turn, each with its spread.

use std::rc::Rc;
use std::time::Instant;

use cubecl::{Runtime, client::ComputeClient, future::block_on};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};

use crate::failure::Result;

/// Milliseconds of several samples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Times {
    /// The middle one.
    pub median: f64,
    /// A quarter of the samples are shorter.
    pub lower: f64,
    /// A quarter of the samples are longer.
    pub upper: f64,
    /// The shortest.
    pub min: f64,
    /// The longest.
    pub max: f64,
    /// All of them, in the order in which they were taken.
    #[serde(skip)]
    samples: Rc<[f64]>,
}

/// How many times longer one thing takes than another that was timed in turn with it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio {
    /// Of the rounds' ratios.
    pub median: f64,
    /// The ends of the 95 % confidence interval of the median; with fewer rounds than that takes, the ratios of the extremes.
    pub interval: (f64, f64),
}

impl Ratio {
    /// The ratio, unless it may be noise: the interval holds 1.
    pub fn sure(&self) -> Option<f64> {
        (self.interval.0 > 1.0 || self.interval.1 < 1.0).then_some(self.median)
    }

    /// What `--json` says of it: no ratio inside the noise, but the interval.
    pub fn json(&self) -> Value {
        json!({ "ratio": self.sure(), "interval": [self.interval.0, self.interval.1] })
    }
}

impl Times {
    /// The summary of at least one sample.
    pub fn of(samples: Vec<f64>) -> Self {
        let sorted = sorted(samples.iter().copied());
        let (count, last) = (sorted.len(), sorted.len().saturating_sub(1));
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        Self {
            median: at(count / 2),
            lower: at(count / 4),
            upper: at(last - count / 4),
            min: at(0),
            max: at(last),
            samples: samples.into(),
        }
    }

    /// How many times longer than `other`, round by round: what slows a round slows both.
    pub fn over(&self, other: &Self) -> Ratio {
        let ratios = sorted(self.samples.iter().zip(other.samples.iter()).map(|(a, b)| a / b));
        let count = ratios.len() as f64;
        // The signs of a median's deviations are coins: so many of the outermost lie outside in one case of forty, a side.
        let outside = (count / 2.0 - 0.98 * count.sqrt() - 0.5).max(0.0) as usize;
        let at = |index: usize| ratios.get(index).copied().unwrap_or(f64::NAN);
        let interval = match ratios.len() < SURE {
            true => (self.min / other.max, self.max / other.min),
            false => (at(outside), at(ratios.len() - 1 - outside)),
        };
        Ratio { median: at(ratios.len() / 2), interval }
    }

    /// Half of the spread of the middle half, as a share of the median.
    pub fn spread(&self) -> f64 {
        (self.upper - self.lower) / 2.0 / self.median
    }
}

fn sorted(numbers: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    numbers
}

/// How long to measure.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// The most samples of each.
    pub samples: usize,
    /// Milliseconds for all samples together, if [`FEWEST`] of each take no longer.
    pub budget_ms: f64,
}

/// Something to time: enqueues its work and returns.
pub type Run<'a> = &'a dyn Fn() -> Result<()>;

/// Samples of each of `runs`, after a first run that compiles its kernels: in turn, so that a device that slows down slows all of
/// them. A sample is as many launches back to back as last [`SHORTEST`], and [`wait`](waiting), divided by their number.
pub fn interleaved(wait: Run<'_>, runs: &[Run<'_>], effort: Effort, what: &str) -> Result<Vec<Times>> {
    let bar = progress(runs.len(), what);
    let mut launches = Vec::new();
    let mut round = 0.0;
    for run in runs {
        timed(wait, run, 1)?;
        let once = timed(wait, run, 1)?;
        let needed = (SHORTEST / once).ceil().clamp(1.0, MOST_LAUNCHES);
        round += needed * once;
        launches.push(needed as usize);
        bar.inc(1);
    }
    let affordable = (effort.budget_ms / round) as usize;
    let samples = affordable.clamp(FEWEST.min(effort.samples), effort.samples);
    bar.inc_length((samples * runs.len()) as u64);
    let mut found = vec![Vec::new(); runs.len()];
    for _ in 0..samples {
        for ((found, run), &launches) in found.iter_mut().zip(runs).zip(&launches) {
            found.push(timed(wait, run, launches)?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(found.into_iter().map(Times::of).collect())
}

/// Rounds from which on the least and the largest ratio enclose the median in 95 of 100 cases.
const SURE: usize = 6;
/// Fewer samples have no middle half.
pub const FEWEST: usize = 3;
/// Milliseconds.
const SHORTEST: f64 = 1.0;
const MOST_LAUNCHES: f64 = 64.0;

/// A bar for `steps` steps of `what`; on a terminal only.
pub fn progress(steps: usize, what: &str) -> ProgressBar {
    let bar = ProgressBar::new(steps as u64).with_message(what.to_string());
    match ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Waits until a device has done all that was enqueued.
pub fn waiting<R: Runtime>(client: &ComputeClient<R>) -> impl Fn() -> Result<()> {
    || Ok(block_on(client.sync())?)
}

/// Nothing to wait for: a run that returns is done.
pub fn done() -> Result<()> {
    Ok(())
}

/// Milliseconds of one of `launches` launches, `wait` included.
pub fn timed(wait: Run<'_>, run: Run<'_>, launches: usize) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..launches {
        run()?;
    }
    wait()?;
    Ok(milliseconds(start) / launches as f64)
}

/// Milliseconds since `start`.
pub fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_inside_the_noise_is_none() {
        let (short, long) = (Times::of(vec![1.0, 1.1, 0.9]), Times::of(vec![2.0, 2.2, 2.7]));
        assert_eq!((short.median, short.lower, short.upper), (1.0, 0.9, 1.1));
        assert_eq!((long.over(&short).sure(), short.over(&long).sure()), (Some(2.0), Some(0.5)));
        assert_eq!(long.over(&short).interval, (2.0 / 1.1, 2.7 / 0.9));
        assert_eq!(Times::of(vec![0.5, 1.2, 4.0]).over(&short).sure(), None);
    }

    #[test]
    fn what_slows_a_round_slows_both() {
        let rounds: Vec<f64> = (0..15).map(|round| 1.0 + f64::from(round)).collect();
        let slower = Times::of(rounds.iter().map(|ms| ms * 1.1).collect());
        let ratio = slower.over(&Times::of(rounds)).sure().unwrap_or(f64::NAN);
        assert!((ratio - 1.1).abs() < 1e-9, "{ratio}");
    }

    #[test]
    fn an_interval_leaves_out_so_many_samples() {
        let ones = |count: usize| Times::of(vec![1.0; count]);
        let outside = |count: usize| {
            let (from, _) = Times::of((1..=count).map(|at| at as f64).collect()).over(&ones(count)).interval;
            from as usize - 1
        };
        // The binomial distribution's quantiles.
        assert_eq!([6, 9, 12, 15, 20, 100].map(outside), [0, 1, 2, 3, 5, 39]);
    }

    #[test]
    fn one_odd_sample_is_no_spread() {
        let times = Times::of(vec![1.0, 1.0, 1.0, 1.0, 9.0]);
        assert_eq!((times.median, times.spread(), times.max), (1.0, 0.0, 9.0));
    }
}
