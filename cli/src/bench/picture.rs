//! Pictures as files: SVG as it was drawn, or PNG rendered from it with letters that travel with the command.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree};

use crate::failure::{Failure, Result};

/// Where a picture goes. Made before anything is measured, so that no measurement is lost to a bad path.
#[derive(Debug)]
pub struct Picture {
    path: PathBuf,
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Format {
    Svg,
    Png,
}

impl Picture {
    /// A picture at `path`, whose ending says which kind.
    pub fn at(path: &Path) -> Result<Self> {
        let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase());
        let format = match ending.as_deref() {
            Some("svg") => Format::Svg,
            Some("png") => Format::Png,
            _ => {
                return Err(Failure::new(format!(
                    "--plot {}: expected a file that ends in .svg or .png",
                    path.display()
                )));
            }
        };
        let there = path.exists();
        OpenOptions::new().append(true).create(true).open(path).map_err(|error| unwritable(path, &error))?;
        if !there {
            fs::remove_file(path)?;
        }
        Ok(Self { path: path.to_path_buf(), format })
    }

    /// Writes the picture.
    pub fn write(&self, svg: &str) -> Result<()> {
        let bytes = match self.format {
            Format::Svg => svg.as_bytes().to_vec(),
            Format::Png => png(svg)?,
        };
        fs::write(&self.path, bytes).map_err(|error| unwritable(&self.path, &error))
    }

    /// The line about it in a report.
    pub fn line(&self) -> String {
        format!("\nPicture: {}\n", self.path.display())
    }
}

fn unwritable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(format!("--plot {}: {error}", path.display()))
}

/// The picture in pixels.
fn png(svg: &str) -> Result<Vec<u8>> {
    let mut options = Options::default();
    let fonts = options.fontdb_mut();
    fonts.load_font_data(epaint_default_fonts::UBUNTU_LIGHT.to_vec());
    let family = fonts.faces().next().and_then(|face| face.families.first()).map(|(name, _)| name.clone());
    fonts.set_sans_serif_family(family.ok_or_else(|| Failure::new("the bundled font can't be read"))?);
    let tree = Tree::from_str(svg, &options)?;
    let size = tree.size().to_int_size().scale_by(PIXELS).ok_or_else(|| Failure::new("the picture is too large"))?;
    let mut pixels =
        Pixmap::new(size.width(), size.height()).ok_or_else(|| Failure::new("the picture is too large"))?;
    resvg::render(&tree, Transform::from_scale(PIXELS, PIXELS), &mut pixels.as_mut());
    Ok(pixels.encode_png()?)
}

/// Pixels of a PNG for one of the picture's, a side: screens are finer than their pages.
const PIXELS: f32 = 2.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_drawn_without_a_system_font() {
        let svg = |text| {
            format!(
                "<svg width=\"60\" height=\"20\" xmlns=\"http://www.w3.org/2000/svg\"><rect width=\"60\" height=\"20\" \
                 fill=\"#fff\"/><text x=\"4\" y=\"14\" font-family=\"sans-serif\" font-size=\"13\">{text}</text></svg>"
            )
        };
        let pixels = |text| Pixmap::decode_png(&png(&svg(text)).expect("it renders")).expect("it is a PNG");
        let dark = |text| pixels(text).pixels().iter().filter(|pixel| pixel.red() < 128).count();
        assert_eq!((pixels("").width(), dark("")), (120, 0));
        for text in ["1", "×", "MoE", "²"] {
            assert!(dark(text) > 5, "{text} is not drawn");
        }
    }

    #[test]
    fn the_ending_says_which_kind_and_nothing_is_left_behind() {
        let folder = std::env::temp_dir();
        for (name, format) in [("ultramem-plot-test.SVG", Format::Svg), ("ultramem-plot-test.png", Format::Png)] {
            let path = folder.join(name);
            assert_eq!(Picture::at(&path).expect("it can be written").format, format);
            assert!(!path.exists());
        }
        for path in ["out.jpg", "out", "/nonexistent/out.svg"] {
            let failure = Picture::at(Path::new(path)).expect_err("it can't be written");
            assert!(failure.to_string().contains(path), "{failure}");
        }
    }
}
