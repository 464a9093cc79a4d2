//! What lanes find out together: votes, matches, reductions, who is there, and who is chosen.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::testing::{self, bytes, longs, numbers, program, threads};
use crate::{ParseError, Stop};

/// Lanes that there are.
fn existing(count: u32) -> u32 {
    if count == 32 { u32::MAX } else { (1 << count) - 1 }
}

/// A number of each lane in `%rd1` and its lower half in `%r1`, and a bit of it in `%p1`; the result is `%rd0`.
fn run(count: u32, given: &[u64], code: &str) -> Vec<u64> {
    let body = format!(
        "mov.u32 %r500, %laneid;\nmad.wide.u32 %rd500, %r500, 8, %a0;\nld.global.u64 %rd1, [%rd500];\ncvt.u32.u64 %r1, %rd1;\n\
         and.b32 %r2, %r1, 1;\nsetp.eq.u32 %p1, %r2, 1;\n{code}\nst.global.u64 [%rd500], %rd0;\n"
    );
    let mut buffers = [bytes(given, u64::to_le_bytes)];
    testing::run_as(&body, threads(count), &mut buffers, &mut ()).unwrap_or_else(|stop| panic!("{stop:?}\n{body}"));
    numbers(&buffers[0], u64::from_le_bytes)[..count as usize].to_vec()
}

/// Numbers of 32 lanes: all the same, few different ones, any.
fn draws() -> Vec<Vec<u64>> {
    let mut rng = StdRng::seed_from_u64(77);
    let mut all = vec![vec![0; 32], vec![u64::MAX; 32], (0..32).collect(), vec![1 << 40; 32]];
    for _ in 0..20 {
        let few: [u64; 3] = rng.random();
        all.push((0..32).map(|_| few[rng.random_range(0..3)]).collect());
        all.push((0..32).map(|_| rng.random()).collect());
        let one = rng.random_range(0..32);
        all.push((0..32).map(|lane| few[usize::from(lane == one)]).collect());
    }
    all
}

#[test]
fn votes() {
    for given in draws() {
        for count in [32, 17, 1] {
            let votes: Vec<bool> = given[..count as usize].iter().map(|number| number & 1 == 1).collect();
            let ballot: u32 = votes.iter().enumerate().map(|(lane, vote)| u32::from(*vote) << lane).sum();
            let (all, any) = (votes.iter().all(|it| *it), votes.iter().any(|it| *it));
            let truth = |line: &str| run(count, &given, &format!("{line}\nselp.u64 %rd0, 1, 0, %p2;"));
            for (line, holds) in [
                ("vote.sync.all.pred %p2, %p1, -1;", all),
                ("vote.sync.any.pred %p2, %p1, -1;", any),
                ("vote.sync.uni.pred %p2, %p1, -1;", all || !any),
                ("vote.sync.all.pred %p2, !%p1, -1;", !any),
                ("vote.sync.any.pred %p2, !%p1, -1;", !all),
                ("vote.sync.uni.pred %p2, !%p1, -1;", all || !any),
                ("vote.sync.all.pred %p2, 1, -1;", true),
                ("mov.pred %p2, %p1;\nvote.sync.any.pred %p2, %p2, -1;", any),
            ] {
                assert_eq!(truth(line), vec![u64::from(holds); count as usize], "{line} {ballot:b} of {count}");
            }
            let line = "vote.sync.ballot.b32 %r3, %p1, -1;\ncvt.u64.u32 %rd0, %r3;";
            assert_eq!(run(count, &given, line), vec![u64::from(ballot); count as usize]);
            let line = "vote.sync.ballot.b32 %r3, !%p1, -1;\ncvt.u64.u32 %rd0, %r3;";
            assert_eq!(run(count, &given, line), vec![u64::from(!ballot & existing(count)); count as usize]);
        }
    }
}

#[test]
fn matches_of_numbers() {
    for given in draws() {
        for count in [32, 17, 1] {
            let given = &given[..count as usize];
            for (ty, register, mask) in [("b32", "%r1", u64::from(u32::MAX)), ("b64", "%rd1", u64::MAX)] {
                let same = |lane: usize| {
                    let equal = |other: &usize| given[*other] & mask == given[lane] & mask;
                    (0..given.len()).filter(equal).map(|other| 1u64 << other).sum::<u64>()
                };
                let any =
                    run(count, given, &format!("match.any.sync.{ty} %r3, {register}, -1;\ncvt.u64.u32 %rd0, %r3;"));
                assert_eq!(any, (0..given.len()).map(same).collect::<Vec<_>>(), "{ty} {given:?}");
                let all = same(0) == u64::from(existing(count));
                let wanted = if all { 1 << 32 | u64::from(existing(count)) } else { 0 };
                let line = format!(
                    "match.all.sync.{ty} %r3|%p2, {register}, -1;\nselp.b32 %r4, 1, 0, %p2;\nmov.b64 %rd0, {{%r3, %r4}};"
                );
                assert_eq!(run(count, given, &line), vec![wanted; given.len()], "{ty} {given:?}");
            }
        }
    }
}

/// What two numbers make.
type Join = fn(u32, u32) -> u32;

#[test]
fn reductions() {
    let rows: [(&str, Join); 9] = [
        ("add.u32", u32::wrapping_add),
        ("add.s32", u32::wrapping_add),
        ("min.u32", u32::min),
        ("max.u32", u32::max),
        ("min.s32", |a, b| (a as i32).min(b as i32) as u32),
        ("max.s32", |a, b| (a as i32).max(b as i32) as u32),
        ("and.b32", |a, b| a & b),
        ("or.b32", |a, b| a | b),
        ("xor.b32", |a, b| a ^ b),
    ];
    for given in draws() {
        for count in [32, 17, 1] {
            let given = &given[..count as usize];
            for (name, join) in rows {
                let wanted = given.iter().map(|number| *number as u32).reduce(join).unwrap();
                let found = run(count, given, &format!("redux.sync.{name} %r3, %r1, -1;\ncvt.u64.u32 %rd0, %r3;"));
                assert_eq!(found, vec![u64::from(wanted); given.len()], "{name} of {given:?}");
            }
        }
    }
}

/// Groups that name themselves only: the lanes of each two bits of the lane's number.
#[test]
fn groups_for_themselves() {
    let start = "mov.u32 %r1, %laneid;\nand.b32 %r2, %r1, 3;\nmov.u32 %r3, 0x11111111;\nshl.b32 %r3, %r3, %r2;\n";
    let group = |lane: u64| (0..32).filter(move |other| other % 4 == lane % 4);
    let check = |code: &str, expected: &dyn Fn(u64) -> u64| {
        let found = longs(threads(32), &format!("{start}{code}"));
        assert_eq!(found, (0..32).map(expected).collect::<Vec<_>>(), "{code}");
    };
    check("redux.sync.add.u32 %r4, %r1, %r3;\ncvt.u64.u32 %rd0, %r4;", &|lane| group(lane).sum());
    check("redux.sync.max.s32 %r4, %r1, %r3;\ncvt.u64.u32 %rd0, %r4;", &|lane| group(lane).max().unwrap());
    check("vote.sync.ballot.b32 %r4, 1, %r3;\ncvt.u64.u32 %rd0, %r4;", &|lane| group(lane).map(|it| 1 << it).sum());
    check("match.any.sync.b32 %r4, %r2, %r3;\ncvt.u64.u32 %rd0, %r4;", &|lane| group(lane).map(|it| 1 << it).sum());
    check("elect.sync %r4|%p1, %r3;\ncvt.u64.u32 %rd0, %r4;\n@%p1 add.u64 %rd0, %rd0, 100;", &|lane| {
        lane % 4 + if lane < 4 { 100 } else { 0 }
    });
    check("bar.warp.sync %r3;\nmov.u64 %rd0, 1;", &|_| 1);
}

#[test]
fn who_is_there_and_who_is_chosen() {
    for count in [32, 17, 1] {
        let check = |code: &str, expected: &dyn Fn(u64) -> u64| {
            let found = longs(threads(count), &format!("mov.u32 %r1, %laneid;\nsetp.ge.u32 %p0, %r1, 9;\n{code}"));
            assert_eq!(found, (0..u64::from(count)).map(expected).collect::<Vec<_>>(), "{code} of {count}");
        };
        let mask = existing(count);
        check("activemask.b32 %r2;\ncvt.u64.u32 %rd0, %r2;", &|_| u64::from(mask));
        check("mov.u32 %r2, 5;\n@%p0 activemask.b32 %r2;\ncvt.u64.u32 %rd0, %r2;", &|lane| {
            if lane < 9 { 5 } else { u64::from(mask & !0x1ff) }
        });
        for (form, leader) in [("%r2|%p1", 0), ("_|%p1", 50)] {
            let code = format!(
                "mov.u32 %r2, 50;\nelect.sync {form}, -1;\ncvt.u64.u32 %rd0, %r2;\n@%p1 add.u64 %rd0, %rd0, 100;"
            );
            check(&code, &|lane| leader + if lane == 0 { 100 } else { 0 });
        }
        if count > 9 {
            let members = mask & !0x1ff;
            check(
                &format!("@%p0 elect.sync %r2|%p1, {members};\ncvt.u64.u32 %rd0, %r2;\n@%p1 add.u64 %rd0, %rd0, 100;"),
                &|lane| {
                    if lane < 9 { 0 } else { 9 + if lane == 9 { 100 } else { 0 } }
                },
            );
        }
    }
}

/// Lanes that are named have to come unless they have ended; who comes has to be named.
#[test]
fn members_come_and_are_named() {
    for line in [
        "vote.sync.any.pred %p1, %p0, {};",
        "bar.warp.sync {};",
        "shfl.sync.up.b32 %r2, %r1, 1, 0, {};",
        "redux.sync.or.b32 %r2, %r1, {};",
        "match.all.sync.b32 %r2|%p1, %r1, {};",
        "elect.sync %r2|%p1, {};",
    ] {
        let stop = |guard: &str, members: &str| {
            let body =
                format!("mov.u32 %r1, %laneid;\nsetp.lt.u32 %p0, %r1, 4;\n{guard}{}", line.replace("{}", members));
            testing::run(&body, &mut []).map(|_| ())
        };
        let missing = |stop: Result<(), Stop>| match stop {
            Err(Stop::DivergentWarp { missing, .. }) => Some(missing),
            _ => None,
        };
        assert_eq!(stop("", "-1"), Ok(()), "{line}");
        assert_eq!(stop("@%p0 ", "15"), Ok(()), "{line}");
        assert_eq!(stop("@!%p0 ret;\n", "15"), Ok(()), "{line}");
        assert_eq!(stop("@!%p0 ret;\n", "-1"), Ok(()), "{line}");
        assert_eq!(missing(stop("@%p0 ", "0x1f")), Some(16), "{line}");
        assert_eq!(missing(stop("@%p0 ", "7")), Some(8), "{line}");
        assert_eq!(missing(stop("", "0x7fffffff")), Some(1 << 31), "{line}");
        assert_eq!(missing(stop("", "0")), Some(u32::MAX), "{line}");
    }
}

#[test]
fn what_the_manual_does_not_have_is_not_known() {
    for form in [
        "vote.ballot.b32 %r0, %p0;",
        "vote.sync.ballot.b32 %p0, %p1, -1;",
        "vote.sync.all.pred %r0, %p1, -1;",
        "vote.sync.all.b32 %p0, %p1, -1;",
        "vote.sync.none.pred %p0, %p1, -1;",
        "vote.sync.all.pred %p0, %r1, -1;",
        "vote.sync.all.pred %p0, %p1;",
        "match.any.sync.b32 %r0|%p0, %r1, -1;",
        "match.any.sync.b16 %r0, %h1, -1;",
        "match.some.sync.b32 %r0, %r1, -1;",
        "match.all.sync.b64 %rd0, %rd1, -1;",
        "redux.sync.add.b32 %r0, %r1, -1;",
        "redux.sync.xor.u32 %r0, %r1, -1;",
        "redux.sync.min.f32 %f0, %f1, -1;",
        "redux.sync.add.u32 %rd0, %r1, -1;",
        "redux.add.u32 %r0, %r1, -1;",
        "activemask.b32 %p0;",
        "elect.sync %r0, -1;",
        "elect.sync %p0, -1;",
    ] {
        assert!(matches!(program(form, 1), Err(ParseError::Unknown { .. })), "{form}");
    }
}
