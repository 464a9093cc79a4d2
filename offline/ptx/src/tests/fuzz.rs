//! Ten thousand broken texts: none makes the parser panic, and what it reads doesn't either when it runs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{SystemTime, UNIX_EPOCH};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::testing::{self, threads};
use crate::{Program, Shape};

const SHAPE: Shape = Shape { blocks: [2, 1, 1], dynamic_shared: 512, ..threads(48) };

/// A sum of a block: shared memory, barriers, shuffles, an atomic operation.
const SUM: &str = include_str!("texts/sum.ptx");
/// A product of matrices: asynchronous copies, barriers in shared memory, matrix units.
const PRODUCT: &str = include_str!("texts/product.ptx");
/// A bit of all else: tables of jumps, local memory, variables, vectors, conversions.
const REST: &str = include_str!("texts/rest.ptx");

/// Runs a kernel with three buffers; how it ends does not matter.
fn run(text: &str) -> bool {
    let Ok(program) = Program::parse(text) else { return false };
    let mut buffers = [vec![3; 4096], vec![0; 4096], vec![0; 4096]];
    let _ = testing::run_program(&program, SHAPE, &mut buffers, &mut ());
    true
}

#[test]
fn whole_texts_run() {
    for text in [SUM, PRODUCT, REST] {
        let program = Program::parse(text).unwrap();
        let mut buffers = [vec![3; 4096], vec![0; 4096], vec![0; 4096]];
        testing::run_program(&program, SHAPE, &mut buffers, &mut ()).unwrap();
        assert!(buffers[1].iter().any(|byte| *byte != 0));
    }
}

/// Words of a text, what parts them included.
fn words(line: &str) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for letter in line.chars() {
        let belongs = |last: &String| {
            let inner = |letter: char| letter.is_alphanumeric() || "%._$".contains(letter);
            last.chars().all(inner) && inner(letter)
        };
        match all.last_mut().filter(|last| belongs(last)) {
            Some(last) => last.push(letter),
            None => all.push(letter.to_string()),
        }
    }
    all
}

/// Breaks a text in one place.
fn mutate(lines: &mut Vec<String>, pool: &[String], rng: &mut StdRng) {
    const LETTERS: &str = "0123456789abfrvxXu%@!.,;:[]{}()|+-=<>_ $\"/\\\u{e9}\t";
    let at = rng.random_range(0..lines.len());
    let letter = |rng: &mut StdRng| LETTERS.chars().nth(rng.random_range(0..LETTERS.chars().count())).unwrap_or(' ');
    match rng.random_range(0..12) {
        0 if lines.len() > 1 => drop(lines.remove(at)),
        1 => lines.insert(at, lines[at].clone()),
        2 => {
            let other = rng.random_range(0..lines.len());
            lines.swap(at, other);
        }
        3 => lines[at] = pool[rng.random_range(0..pool.len())].clone(),
        4 => lines.insert(at, pool[rng.random_range(0..pool.len())].clone()),
        5..9 => {
            // A word becomes another one.
            let mut own = words(&lines[at]);
            let others = words(&pool[rng.random_range(0..pool.len())]);
            if let (false, false) = (own.is_empty(), others.is_empty()) {
                let place = rng.random_range(0..own.len());
                own[place] = others[rng.random_range(0..others.len())].clone();
            }
            lines[at] = own.concat();
        }
        way => {
            let mut letters: Vec<char> = lines[at].chars().collect();
            let place = rng.random_range(0..=letters.len());
            match way {
                9 => letters.insert(place, letter(rng)),
                10 if place < letters.len() => drop(letters.remove(place)),
                _ if place < letters.len() => letters[place] = letter(rng),
                _ => {}
            }
            lines[at] = letters.into_iter().collect();
        }
    }
}

#[test]
fn broken_texts_do_not_panic() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let seed =
        std::env::var("ULTRAMEM_PTX_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(now.as_nanos() as u64);
    println!("ULTRAMEM_PTX_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let texts = [SUM, PRODUCT, REST];
    let pool: Vec<String> = texts.iter().flat_map(|text| text.lines().map(str::to_owned)).collect();
    let mut ran = 0;
    for round in 0..10_000 {
        let mut lines: Vec<String> = texts[round % 3].lines().map(str::to_owned).collect();
        for _ in 0..rng.random_range(1..4) {
            mutate(&mut lines, &pool, &mut rng);
        }
        let text = lines.join("\n");
        match catch_unwind(AssertUnwindSafe(|| run(&text))) {
            Ok(runs) => ran += u32::from(runs),
            Err(_) => panic!("seed {seed}, round {round}: this text makes it panic\n{text}"),
        }
    }
    // Else the texts are so broken that nothing is tried.
    assert!(ran > 1000, "only {ran} ran");
}
