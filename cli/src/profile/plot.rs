//! The picture of a profile: a bar a pass, its stages one after the other, coloured by what binds their kernels, on one axis of microseconds;
//! the gather's floor is a dashed line through all of them.

use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::bench::chart::look::{BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION};
use crate::bench::chart::{
    Area, DASH, DEVICE, GAP, GREY, LEGEND, LEGEND_ROW, MARGIN, RULE, SWATCH, TITLE, WIDTH, font, number,
};
use crate::failure::Result;
use crate::numbers::grouped;

/// What is drawn.
#[derive(Debug)]
pub struct Bars {
    /// What is shown.
    pub title: String,
    /// For what it was counted.
    pub device: String,
    /// From top to bottom.
    pub bars: Vec<Bar>,
    /// Microseconds of the gather.
    pub floor: f64,
}

/// A pass.
#[derive(Debug)]
pub struct Bar {
    /// Its name.
    pub name: String,
    /// From left to right.
    pub segments: Vec<Segment>,
}

/// What one thing binds of a stage.
#[derive(Debug, Clone, PartialEq)]
pub struct Segment {
    /// The stage.
    pub stage: String,
    /// What binds.
    pub binds: String,
    /// Microseconds.
    pub time: f64,
}

impl Bar {
    /// A pass of kernels: those of a stage that the same thing binds are one segment.
    pub fn new<'a>(name: &str, kernels: impl Iterator<Item = (&'a str, &'a str, f64)>) -> Self {
        let mut segments: Vec<Segment> = Vec::new();
        for (stage, binds, time) in kernels {
            match segments.iter_mut().find(|it| it.stage == stage && it.binds == binds) {
                Some(segment) => segment.time += time,
                None => segments.push(Segment { stage: stage.into(), binds: binds.into(), time }),
            }
        }
        // Segments of a stage lie side by side.
        let stages: Vec<String> = segments.iter().map(|it| it.stage.clone()).collect();
        segments.sort_by_key(|it| stages.iter().position(|stage| *stage == it.stage));
        Self { name: name.into(), segments }
    }

    fn time(&self) -> f64 {
        self.segments.iter().map(|it| it.time).sum()
    }

    /// The stages with their times.
    fn stages(&self) -> Vec<(&str, f64)> {
        let of = |part: &[Segment]| part.iter().map(|it| it.time).sum();
        let named = |part: &'_ [Segment]| part[0].stage.split('-').next().unwrap_or_default().len();
        let parts = self.segments.chunk_by(|a, b| a.stage == b.stage);
        parts.map(|part| (&part[0].stage[..named(part)], of(part))).collect()
    }
}

/// A colour for each thing that binds often; the others share one.
const COLOURS: [(&str, RGBColor); 9] = [
    ("memory", BLUE),
    ("cache", SKY),
    ("shared and lines", VERMILION),
    ("ALU", ORANGE),
    ("FMA", RGBColor(0xf0, 0xe4, 0x42)),
    ("issue", PURPLE),
    ("matrix", GREEN),
    ("latency", RGBColor(0x80, 0x80, 0x80)),
    ("launch", RGBColor(0xc8, 0xc8, 0xc8)),
];

fn colour(binds: &str) -> RGBColor {
    COLOURS.iter().find(|it| it.0 == binds).map_or(BLACK, |it| it.1)
}

const FLOOR: &str = "the gather's floor";
/// Pixels of names on the left, of times on the right, of a bar, of the names below it, and from bar to bar.
const NAMES: i32 = 84;
const TIMES: i32 = 84;
const BAR: i32 = 30;
const BELOW: i32 = 18;
const PITCH: i32 = 66;
const AXIS: i32 = 46;

impl Bars {
    /// The picture as SVG.
    pub fn svg(&self) -> Result<String> {
        let mut svg = String::new();
        {
            let legend = self.legend();
            let top = legend.last().map_or(LEGEND, |entry| entry.1.1) + LEGEND_ROW + 4;
            let bottom = top + PITCH * self.bars.len() as i32;
            let area = SVGBackend::with_string(&mut svg, (WIDTH, (bottom + AXIS) as u32)).into_drawing_area();
            area.fill(&WHITE)?;
            area.draw(&Text::new(self.title.clone(), (MARGIN, TITLE), font(18)))?;
            area.draw(&Text::new(self.device.clone(), (MARGIN, DEVICE), font(13).color(&GREY)))?;
            for (name, at) in &legend {
                entry(&area, name, *at)?;
            }
            self.axis(&area, top, bottom)?;
            for (at, bar) in self.bars.iter().enumerate() {
                self.bar(&area, bar, top + PITCH * at as i32 + 6)?;
            }
            let x = self.x(self.floor);
            let style = BLACK.stroke_width(2);
            area.draw(&DashedPathElement::new([(x, top), (x, bottom)], DASH, GAP, style))?;
            area.present()?;
        }
        Ok(svg)
    }

    /// What binds, and the floor, with the place of each.
    fn legend(&self) -> Vec<(String, (i32, i32))> {
        let there = |binds: &str| self.bars.iter().flat_map(|bar| &bar.segments).any(|it| it.binds == binds);
        let mut names: Vec<String> = COLOURS.iter().map(|it| it.0).filter(|it| there(it)).map(String::from).collect();
        let known = |binds: &str| COLOURS.iter().any(|it| it.0 == binds);
        for segment in self.bars.iter().flat_map(|bar| &bar.segments) {
            if !known(&segment.binds) && !names.contains(&segment.binds) {
                names.push(segment.binds.clone());
            }
        }
        names.push(format!("{FLOOR}, {}", micros(self.floor)));
        let mut at = (MARGIN, LEGEND);
        let mut placed = Vec::new();
        for name in names {
            // Letters of 13 pixels are about seven wide.
            let width = SWATCH + 5 + 7 * name.chars().count() as i32 + 18;
            if at.0 + width > WIDTH as i32 {
                at = (MARGIN, at.1 + LEGEND_ROW);
            }
            placed.push((name, at));
            at.0 += width;
        }
        placed
    }

    /// Microseconds at the right end.
    fn longest(&self) -> f64 {
        self.bars.iter().map(Bar::time).chain([self.floor]).fold(1e-3, f64::max)
    }

    fn x(&self, time: f64) -> i32 {
        let width = f64::from(WIDTH as i32 - 2 * MARGIN - NAMES - TIMES);
        MARGIN + NAMES + (time / self.longest() * width).round() as i32
    }

    fn axis(&self, area: &Area<'_>, top: i32, bottom: i32) -> Result<()> {
        let style = font(13).color(&GREY).pos(Pos::new(HPos::Center, VPos::Top));
        let step = step(self.longest());
        let ticks = (0..).map(|at| f64::from(at) * step).take_while(|tick| *tick <= self.longest());
        for tick in ticks {
            let x = self.x(tick);
            area.draw(&PathElement::new([(x, top), (x, bottom)], RULE.stroke_width(1)))?;
            area.draw(&Text::new(number(tick), (x, bottom + 4), style.clone()))?;
        }
        let middle = (self.x(0.0) + self.x(self.longest())) / 2;
        Ok(area.draw(&Text::new("predicted time (µs)".to_string(), (middle, bottom + 22), style))?)
    }

    fn bar(&self, area: &Area<'_>, bar: &Bar, top: i32) -> Result<()> {
        let middle = top + BAR / 2;
        let style = |horizontal| font(14).pos(Pos::new(horizontal, VPos::Center));
        area.draw(&Text::new(bar.name.clone(), (MARGIN, middle), style(HPos::Left)))?;
        let mut time = 0.0;
        for segment in &bar.segments {
            let (left, right) = (self.x(time), self.x(time + segment.time));
            time += segment.time;
            let corners = [(left, top), (right, top + BAR)];
            area.draw(&Rectangle::new(corners, colour(&segment.binds).filled()))?;
            // A thin one is all edge.
            if right - left > 4 {
                area.draw(&Rectangle::new(corners, WHITE.stroke_width(1)))?;
            }
        }
        area.draw(&Text::new(micros(time), (self.x(time) + 6, middle), style(HPos::Left)))?;
        self.stages(area, bar, top + BAR)
    }

    /// The names of the stages under a bar, each between two marks, where there is room.
    fn stages(&self, area: &Area<'_>, bar: &Bar, top: i32) -> Result<()> {
        let mut time = 0.0;
        for (stage, own) in bar.stages() {
            let (left, right) = (self.x(time), self.x(time + own));
            time += own;
            for x in [left, right] {
                area.draw(&PathElement::new([(x, top), (x, top + 6)], GREY.stroke_width(1)))?;
            }
            if right - left > 7 * stage.chars().count() as i32 {
                let style = font(12).color(&GREY).pos(Pos::new(HPos::Center, VPos::Bottom));
                area.draw(&Text::new(stage.to_string(), ((left + right) / 2, top + BELOW), style))?;
            }
        }
        Ok(())
    }
}

fn entry(area: &Area<'_>, name: &str, (x, y): (i32, i32)) -> Result<()> {
    if name.starts_with(FLOOR) {
        let style = BLACK.stroke_width(2);
        area.draw(&DashedPathElement::new([(x, y), (x + SWATCH, y)], DASH, GAP, style))?;
    } else {
        area.draw(&Rectangle::new([(x, y - 6), (x + SWATCH, y + 6)], colour(name).filled()))?;
    }
    let style = font(13).pos(Pos::new(HPos::Left, VPos::Center));
    Ok(area.draw(&Text::new(name.to_string(), (x + SWATCH + 5, y), style))?)
}

fn micros(time: f64) -> String {
    format!("{} µs", if time < 10.0 { format!("{time:.1}") } else { grouped(time.round() as usize) })
}

/// A round distance of ticks: five to ten of them up to `longest`.
fn step(longest: f64) -> f64 {
    let power = 10f64.powf((longest / 5.0).log10().floor());
    let steps = [5.0, 2.0, 1.0].map(|digit| digit * power);
    steps.into_iter().find(|step| longest / step >= 5.0).unwrap_or(power)
}

#[cfg(test)]
mod tests {
    use resvg::usvg::roxmltree::Document;

    use super::*;

    fn made_up() -> Bars {
        let forward = [("query", "latency", 30.0), ("score", "shared and lines", 1000.0), ("combine", "ALU", 700.0)];
        let backward = [
            ("expand-backward", "memory", 180.0),
            ("expand-backward", "launch", 4.0),
            ("expand-backward", "memory", 300.0),
            ("query-backward", "issue", 3300.0),
        ];
        let bars = [("forward", &forward[..]), ("backward", &backward[..])];
        let bars = bars.map(|(name, kernels)| Bar::new(name, kernels.iter().copied())).into();
        Bars { title: "A layer".into(), device: "h100".into(), bars, floor: 169.0 }
    }

    #[test]
    fn kernels_of_a_stage_that_one_thing_binds_are_one_segment() {
        let bars = made_up();
        let backward = &bars.bars[1];
        let found: Vec<(&str, f64)> = backward.segments.iter().map(|it| (it.binds.as_str(), it.time)).collect();
        assert_eq!(found, [("memory", 480.0), ("launch", 4.0), ("issue", 3300.0)]);
        assert_eq!(backward.stages(), [("expand", 484.0), ("query", 3300.0)]);
    }

    #[test]
    fn what_is_drawn_lies_in_the_picture_and_is_to_scale() {
        let svg = made_up().svg().unwrap();
        let document = Document::parse(&svg).unwrap();
        let number = |node: resvg::usvg::roxmltree::Node<'_, '_>, name| {
            node.attribute(name).and_then(|it| it.parse::<f64>().ok()).unwrap_or(0.0)
        };
        let root = document.root_element();
        let (width, height) = (number(root, "width"), number(root, "height"));
        assert_eq!(width, 860.0);
        let nodes = || document.descendants().filter(|it| it.is_element());
        for node in nodes().filter(|it| it.has_tag_name("rect") || it.has_tag_name("text")) {
            let (x, y) = (number(node, "x"), number(node, "y"));
            assert!(x + number(node, "width") <= width && y + number(node, "height") <= height, "{node:?}");
        }
        let colour = |name: &str| {
            let RGBColor(red, green, blue) = super::colour(name);
            format!("#{red:02X}{green:02X}{blue:02X}")
        };
        let widest = |name: &str| {
            let filled = nodes().filter(|it| it.has_tag_name("rect") && it.attribute("fill") == Some(&colour(name)));
            filled.map(|it| number(it, "width")).fold(0.0, f64::max)
        };
        // 3,300 and 700 of 3,784 µs on 860 pixels less margins and names.
        let scale = (860.0 - 2.0 * 16.0 - 2.0 * 84.0) / 3784.0;
        assert!((widest("issue") - 3300.0 * scale).abs() <= 1.5 && (widest("ALU") - 700.0 * scale).abs() <= 1.5);
        let texts: Vec<&str> = nodes().filter_map(|it| it.text()).map(str::trim).collect();
        for text in ["forward", "backward", "3,784 µs", "the gather's floor, 169 µs", "score", "expand", "1,000"] {
            assert!(texts.contains(&text), "{text} is not in {texts:?}");
        }
    }

    #[test]
    fn ticks_are_round() {
        for (longest, expected) in [(3784.0, 500.0), (1000.0, 200.0), (169.0, 20.0), (9.0, 1.0)] {
            assert_eq!(step(longest), expected);
        }
    }
}
